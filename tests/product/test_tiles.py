"""The rules that choose tiles and fusion: pure functions, so every property is checked over many sizes."""

import itertools

import pytest

from ks.patterns import Pattern, make_chain
from ks.product import tiles

SHAPES = [(2048, 4096), (4096, 4096), (4096, 14336), (384, 1536), (7, 13)]
RANKS = [2, 16, 64, 512]
PATTERNS = sorted(
    {
        pattern
        for (rows, cols), rank, family in itertools.product(SHAPES, RANKS, ("monarch", "lowrank"))
        for pattern in make_chain(rows, cols, family).patterns(rank)
    }
)
ARCHS = [80, 86, 90, 100, 120]


@pytest.mark.parametrize("rule", [tiles.factor_tiles, tiles.gradient_tiles])
def test_every_tile_fits_what_a_program_has(rule):
    for pattern, batch, bits, arch, interleaved in itertools.product(
        PATTERNS, (1, 32, 1024, 25088), (16, 32, 64), ARCHS, (False, True)
    ):
        tile = rule(pattern, batch, bits, interleaved, arch)
        for size in (tile.batch, tile.rows, tile.cols):
            assert size >= tiles.SMALLEST
            assert size & (size - 1) == 0
        assert pattern.d % tile.group == 0
        assert tile.group == 1 or interleaved
        step = (
            (tile.batch + tile.rows) * tile.cols if rule is tiles.factor_tiles else (tile.rows + tile.cols) * tile.batch
        )
        assert tile.stages == 1 or tile.stages * step * tile.group * bits // 8 <= tiles.SHARED_KIB.get(arch, 99) * 1024
        sums = tile.batch * tile.rows if rule is tiles.factor_tiles else tile.rows * tile.cols
        assert sums * tile.group <= 128 * 32 * tile.warps, "float32 sums a thread"
        assert 1 <= tile.parts <= max(1, batch // tile.batch)


def test_a_small_batch_is_cut_finer_to_fill_the_card():
    pattern = Pattern(4, 64, 1024, 1)
    wide, narrow = (tiles.factor_tiles(pattern, batch, 16, False, 90) for batch in (25088, 32))
    assert narrow.rows < wide.rows
    assert tiles.gradient_tiles(pattern, 25088, 16, False, 90).parts > 1
    assert tiles.gradient_tiles(pattern, 32, 16, False, 90).parts == 1


def test_neighbouring_t_are_taken_together_where_they_share_sectors():
    assert [tiles.group_of(d) for d in (1, 2, 3, 4, 6, 8, 12)] == [1, 2, 1, 4, 2, 4, 4]
