"""The tiles of the kernels fit every GPU, over all sizes of a study; and what the kernels take over from torch.bmm."""

import itertools

import pytest

from ks.chain import tiles
from ks.chain.patterns import Pattern, make_chain

SHAPES = [(2048, 4096), (4096, 14336), (384, 1536), (24, 36)]
PATTERNS = {
    pattern
    for (rows, cols), rank, family in itertools.product(SHAPES, [2, 16, 32, 64, 512], ("monarch", "butterfly"))
    for pattern in make_chain(rows, cols, family).patterns(rank)
    if pattern.d % tiles.GROUP == 0
}
SHARED_BYTES = 99 * 1024  # of a program, on every GPU of compute capability 8.0 or more


def test_tiles_fit_into_shared_memory_and_cover_every_row_and_sample():
    for pattern, batch, bits in itertools.product(PATTERNS, (1, 32, 1000, 25088), (16, 32)):
        group_bytes = tiles.GROUP * bits // 8
        factor, gradient = tiles.factor_tiles(pattern, batch, bits), tiles.gradient_tiles(pattern, batch, bits)
        held = pattern.c <= factor.cols
        fixed = tiles.SAMPLES * (tiles.ROWS + factor.cols) if held else 0
        stage = tiles.ROWS * factor.cols + (0 if held else tiles.SAMPLES * factor.cols)
        assert (factor.stages * stage + fixed) * group_bytes <= SHARED_BYTES
        assert held or factor.rows == tiles.ROWS, "a program that does not hold its samples writes one tile"
        assert factor.rows % tiles.ROWS == 0
        assert 3 * (tiles.ROWS + tiles.SAMPLES) * gradient.samples * group_bytes <= SHARED_BYTES
        assert gradient.part % gradient.samples == 0


def test_a_small_batch_is_cut_finer_to_fill_the_gpu():
    pattern = Pattern(1, 1024, 64, 4)
    assert [tiles.factor_tiles(pattern, batch, 16).rows for batch in (32, 25088)] == [64, 1024]
    assert [tiles.gradient_tiles(pattern, batch, 16).part for batch in (32, 25088)] == [32, 3136]


@pytest.mark.parametrize(
    ("changed", "bits"),
    [({}, 64), ({"d": 6}, 16), ({"b": 40}, 16), ({"c": 8}, 16), ({"batch": 1000}, 16), ({"b": 128, "c": 128}, 16)],
    ids=str,
)
def test_matrix_products_keep_float64_and_sizes_that_kernels_would_load_badly(changed, bits):
    sizes = {"a": 1, "b": 1024, "c": 64, "d": 4, "batch": 32}
    assert tiles.kernels_pay(Pattern(1, 1024, 64, 4), 32, 16)
    *pattern, batch = (sizes | changed).values()
    assert not tiles.kernels_pay(Pattern(*pattern), batch, bits)
