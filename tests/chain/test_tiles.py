"""The rules that choose tiles: pure functions, so every property is checked over many sizes."""

import itertools

import pytest

from ks.chain import tiles
from ks.chain.patterns import Pattern, make_chain

SHAPES = [(2048, 4096), (4096, 4096), (4096, 14336), (384, 1536), (24, 36)]
RANKS = [2, 16, 32, 64, 512]
PATTERNS = sorted(
    {
        pattern
        for (rows, cols), rank, family in itertools.product(SHAPES, RANKS, ("monarch", "butterfly"))
        for pattern in make_chain(rows, cols, family).patterns(rank)
        if pattern.d % tiles.GROUP == 0
    }
)
ARCHS = [80, 86, 89, 90, 100, 120]
CASES = list(itertools.product(PATTERNS, (1, 32, 1000, 25088), (16, 32), ARCHS))


def steps_of(pattern, tile):
    """The iterations of the loop whose loads a program of the factor kernel pipelines."""
    return -(-tile.rows_of_share // tile.rows) if pattern.c <= tile.cols else -(-pattern.c // tile.cols)


def test_the_tiles_of_a_factor_fit_what_a_program_has():
    for pattern, batch, bits, arch in CASES:
        tile = tiles.factor_tiles(pattern, batch, bits, arch)
        assert tile.rows == 64
        assert tile.batch in (32, 64)
        assert tile.rows_of_share % tile.rows == 0
        assert 1 <= tile.stages <= steps_of(pattern, tile), "no deeper than the loop"
        assert tile.batch * tile.rows * tiles.GROUP <= 64 * 32 * tile.warps, "float32 sums a thread"
        held = pattern.c <= tile.cols
        per_stage = tile.rows * tile.cols if held else (tile.rows + tile.batch) * tile.cols
        fixed = tile.batch * (tile.rows + tile.cols) if held else 0
        elements = tile.stages * per_stage + fixed
        assert elements * tiles.GROUP * bits // 8 <= tiles.SHARED_KIB.get(arch, 99) * 1024
        assert bits > 16 or held or pattern.c > (128 if arch in (90, 100) else 32)


def test_the_tiles_of_a_gradient_fit_what_a_program_has():
    for pattern, batch, bits, arch in CASES:
        tile = tiles.gradient_tiles(pattern, batch, bits, arch)
        assert tile.rows == 64
        assert tile.cols in (32, 64)
        assert tile.samples_of_part % tile.batch == 0
        assert 1 <= tile.stages <= tile.samples_of_part // tile.batch, "no deeper than the loop"
        assert tile.cols * tile.rows * tiles.GROUP <= 64 * 32 * tile.warps, "float32 sums a thread"
        elements = tile.stages * (tile.rows + tile.cols) * tile.batch
        assert elements * tiles.GROUP * bits // 8 <= tiles.SHARED_KIB.get(arch, 99) * 1024


def test_large_tiles_take_more_warps():
    pattern = Pattern(1, 1024, 64, 4)
    assert [tiles.factor_tiles(pattern, batch, 16, 90).warps for batch in (32, 25088)] == [4, 8]
    assert [tiles.gradient_tiles(pattern._replace(c=c), 1024, 16, 90).warps for c in (32, 64)] == [4, 8]


def test_a_small_batch_is_cut_finer_to_fill_the_gpu():
    pattern = Pattern(1, 1024, 64, 4)
    assert tiles.factor_tiles(pattern, 32, 16, 90).rows_of_share == 64
    assert tiles.factor_tiles(pattern, 25088, 16, 90).rows_of_share == 1024
    assert tiles.gradient_tiles(pattern, 32, 16, 90).samples_of_part == 32
    assert tiles.gradient_tiles(pattern, 25088, 16, 90).samples_of_part < 25088 / 8


def programs(batch, tile):
    """Every tile of the factor kernel on (1, b = 1024, c = 64, d = 4), as the kernel numbers them."""
    return itertools.product(range(-(-batch // tile.batch)), range(0, 1024, tile.rows_of_share))


def test_the_traffic_of_a_factor_is_what_its_programs_load_and_store():
    pattern, batch, size = Pattern(1, 1024, 64, 4), 1024, 2
    tile = tiles.factor_tiles(pattern, batch, 16, 90)
    l2 = 0
    for _, _ in programs(batch, tile):
        l2 += tile.batch * 64 * 4 * size  # x, held
        l2 += tile.rows_of_share * 64 * 4 * size  # values
        l2 += tile.batch * tile.rows_of_share * 4 * size  # y
    traffic = tiles.factor_traffic(pattern, batch, 16, tile)
    assert traffic.l2 == l2
    assert traffic.dram == size * (batch * (256 + 4096) + 4 * 64 * 1024)


def test_the_traffic_of_a_gradient_is_what_its_programs_load_and_store():
    pattern, batch, size = Pattern(1, 1024, 64, 4), 25088, 2
    tile = tiles.gradient_tiles(pattern, batch, 16, 90)
    parts, tiles_j, tiles_k = -(-batch // tile.samples_of_part), 1024 // tile.rows, 64 // tile.cols
    loaded = tiles_j * tiles_k * batch * (tile.rows + tile.cols) * 4 * size
    out = 4 * 64 * 1024 * 4
    traffic = tiles.gradient_traffic(pattern, batch, 16, tile)
    assert parts > 1
    assert traffic.l2 == loaded + parts * out + parts * out + out, (
        "each part is written, read again, and their sum written"
    )
    assert traffic.dram == size * batch * (256 + 4096) + out


@pytest.mark.parametrize(("d", "bits", "factor"), [(4, 16, 1), (8, 16, 2), (16, 16, 4), (32, 16, 4), (8, 32, 2)])
def test_a_sector_is_moved_whole(d, bits, factor):
    pattern = Pattern(1, 64, 64, d)
    tile = tiles.factor_tiles(pattern, 64, bits, 90)
    whole = tiles.factor_traffic(pattern, 64, bits, tile)
    parted = tiles.factor_traffic(pattern, 64, bits, tile, y_interleaved=True)
    assert parted.dram == whole.dram
    assert parted.l2 - whole.l2 == (factor - 1) * 64 * 64 * d * bits // 8


def pays(rank, batch, bits=16, arch=90, shape=(4096, 4096)):
    pattern = make_chain(*shape).patterns(rank)[0]
    return tiles.kernels_pay(pattern, batch, bits, arch, x_interleaved=False, y_interleaved=True)


def test_kernels_take_what_keeps_the_traffic_of_l2_below_twice_that_of_memory():
    assert pays(16, 25088) == pays(16, 1024) == pays(16, 32) == (True, True)
    assert pays(64, 25088) == pays(64, 1024) == (False, False)
    assert pays(16, 25088, bits=32) == (False, False)
    for pattern, batch, bits, arch in CASES:
        if any(size % 16 for size in (pattern.b, pattern.c, batch)):
            continue
        forward, _ = tiles.kernels_pay(pattern, batch, bits, arch, x_interleaved=False, y_interleaved=False)
        traffic = tiles.factor_traffic(pattern, batch, bits, tiles.factor_tiles(pattern, batch, bits, arch))
        assert forward == (traffic.l2 <= 2 * traffic.dram)


def test_kernels_take_whole_groups_of_t_alone():
    for d in (1, 2, 3, 6):
        pattern = Pattern(1, 64, 64, d)
        assert tiles.kernels_pay(pattern, 32, 16, 90, x_interleaved=True, y_interleaved=False) == (False, False)


@pytest.mark.parametrize("changed", [{"b": 40}, {"c": 8}, {"batch": 1000}])
def test_sizes_that_would_be_loaded_singly_are_left_to_matrix_products(changed):
    pattern, batch = Pattern(1, 64, 64, 4), changed.pop("batch", 32)
    sides = {"x_interleaved": False, "y_interleaved": True}
    assert tiles.kernels_pay(pattern, 32, 16, 90, **sides) == (True, True)
    assert tiles.kernels_pay(pattern._replace(**changed), batch, 16, 90, **sides) == (False, False)


def test_float64_is_left_to_matrix_products():
    assert pays(4, 32, bits=64) == (False, False)
