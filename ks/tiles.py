"""Tile and fusion rules of the Triton kernels and the choice of the backend: pure functions of sizes, no torch.

`bits` are those of one element of x, `arch` is ten times the compute capability of the card (80, 90, 100, …).
"""

from dataclasses import dataclass
from functools import cache
from math import ceil

from ks.patterns import Pattern, chainability

IMPLS = ("auto", "triton", "bmm")
PRECISIONS = ("ieee", "tf32x3", "tf32")  # of float32 products

MERGE_BATCH = 256  # samples from which on multiplying small factors with each other pays
SMALLEST = 16  # of a side of a matrix product on tensor cores
PROGRAMS = 256  # enough to fill a large GPU (132 to 148 multiprocessors) once or twice
PAIR_SUMS = 64 * 256  # float32 sums of the fused pair in the registers of one program
SHARED_KIB = {80: 163, 90: 227, 100: 227}  # of one program; every other architecture has at least 99


@dataclass(frozen=True)
class Tiles:
    """Sizes of one program's tile: `batch` samples, `rows` of b, `cols` of c, `group` neighbouring t.

    In a gradient of values `parts` is the number of pieces that the batch is cut into, each with sums of its own. In a
    fused pair `rank` is that of a block, padded, `cols` belongs to the factor that meets x and `rows` to the other.
    """

    batch: int
    rows: int
    cols: int
    group: int = 1
    warps: int = 4
    stages: int = 3
    parts: int = 1
    rank: int = 1


def _power_of_two(number: int, low: int, high: int) -> int:
    """The smallest power of two ≥ number, at most high but at least low."""
    return max(low, min(1 << (number - 1).bit_length(), high))


def _operands_stay_in_shared_memory(bits: int, arch: int) -> bool:
    """Whether tensor cores read their operands there (wgmma, tcgen05), which leaves registers for larger tiles."""
    return bits == 16 and arch in (90, 100)


def _stages(elements: int, bits: int, arch: int) -> int:
    """Depth of the load pipeline, for this many elements a step, that fits into shared memory; at most 3."""
    return max(1, min(3, SHARED_KIB.get(arch, 99) * 1024 // (elements * bits // 8)))


def group_of(d: int) -> int:
    """How many neighbouring t one program takes where they share sectors: the largest of 4, 2, 1 that divides d."""
    return 4 if d % 4 == 0 else 2 if d % 2 == 0 else 1


@cache
def factor_tiles(pattern: Pattern, batch: int, bits: int, interleaved: bool, arch: int) -> Tiles:
    """Tiles of y = K x for a factor of `pattern`.

    Args:
        pattern: (a, b, c, d).
        batch: number of samples.
        bits: 16, 32 or 64.
        interleaved: whether neighbouring t are contiguous in x or y.
        arch: architecture.
    """
    a, b, c, d = pattern
    group = group_of(d) if interleaved else 1
    largest = 128 if _operands_stay_in_shared_memory(bits, arch) else 64
    samples = _power_of_two(batch, SMALLEST, largest)
    rows = _power_of_two(b, SMALLEST, largest // group)
    while rows > SMALLEST and ceil(batch / samples) * ceil(b / rows) * a * d // group < PROGRAMS:
        rows //= 2
    cols = _power_of_two(c, SMALLEST, (1024 if group == 1 or samples == 128 else 512) // bits)
    warps = 8 if group == 4 or samples == 128 else 4
    return Tiles(samples, rows, cols, group, warps, _stages((samples + rows) * cols * group, bits, arch))


@cache
def gradient_tiles(pattern: Pattern, batch: int, bits: int, interleaved: bool, arch: int) -> Tiles:
    """Tiles and parts of the gradient for the values of a factor; arguments as in `factor_tiles`."""
    a, b, c, d = pattern
    group = group_of(d) if interleaved else 1
    largest = 64 if group == 1 or _operands_stay_in_shared_memory(bits, arch) else 32
    rows = _power_of_two(b, SMALLEST, largest)
    cols = _power_of_two(c, SMALLEST, largest)
    samples = _power_of_two(batch, SMALLEST, 1024 // bits)
    programs = a * d // group * ceil(b / rows) * ceil(c / cols)
    parts = max(1, min(PROGRAMS // programs, batch // (8 * samples)))
    stages = _stages((rows + cols) * samples * group, bits, arch)
    many = rows * cols * group * bits >= 64 * 64 * 32 or (group == 4 and largest == 32)
    return Tiles(samples, rows, cols, group, 8 if many else 4, stages, parts)


@cache
def pair_tiles(left: Pattern, right: Pattern, batch: int, bits: int, arch: int) -> Tiles | None:
    """Tiles of the fused two-factor chain, or None where it does not fit on chip or does not pay.

    It keeps p·q·r sums of every row of a p × q grid in registers and pads r to 16: it spills where operands need
    registers too, and float32 is not worth the padding. One program takes 64 whole rows, so that small batches would
    leave most of the chip idle.
    """
    p, q = right.a, left.d
    rank = chainability(left, right)
    padded = _power_of_two(rank or 1, SMALLEST, 1024)
    two_factors = left.a == right.d == 1 and rank is not None
    fits = two_factors and p in (1, 2, 4) and q in (1, 2, 4) and 64 * p * q * padded <= PAIR_SUMS
    if not fits or not _operands_stay_in_shared_memory(bits, arch) or batch < 64 * PROGRAMS // 2:
        return None
    stages = _stages(p * (64 + q * padded) * 32, bits, arch)
    return Tiles(64, max(SMALLEST, 64 // q), 32, warps=8, stages=stages, rank=padded)


def merge_runs(patterns: tuple[Pattern, ...], batch: int) -> list[tuple[int, int]]:
    """Which neighbouring factors to multiply with each other before they meet the batch, as (start, stop) ranges.

    Every pass over the activations costs as much as a matrix product with 64 × 64 blocks would: so runs of factors
    with b, c ≤ 16 (butterflies) become one factor with b, c ≤ 64, where the batch is large enough to pay for it.
    """
    runs = []
    start = 0
    while start < len(patterns):
        stop, merged = start + 1, patterns[start]
        while batch >= MERGE_BATCH and stop < len(patterns):
            rank = chainability(merged, patterns[stop])
            small = max(patterns[start].b, patterns[start].c, patterns[stop].b, patterns[stop].c) <= 16
            if rank is None or not small:
                break
            wider = merged_pattern(merged, patterns[stop])
            if max(wider.b, wider.c) > 64:
                break
            stop, merged = stop + 1, wider
        runs.append((start, stop))
        start = stop
    return runs


def merged_pattern(left: Pattern, right: Pattern) -> Pattern:
    """The pattern (a_1, b_1·d_1/d_2, c_2·a_2/a_1, d_2) that contains the product of two chainable factors."""
    return Pattern(left.a, left.b * left.d // right.d, right.c * right.a // left.a, right.d)


def choose_backend(patterns, batch: int, bits: int, precision: str) -> tuple[str, str]:
    """The faster backend for a chain on a CUDA device of capability 8.0 or more.

    Returns:
        ('triton' or 'bmm', the reason).
    """
    if bits == 64:
        return "bmm", "float64 goes to the vendor's library"
    if bits == 32 and precision == "ieee":
        values = sum(pattern.numel for pattern in patterns)
        moved = batch * (patterns[0].rows + patterns[-1].cols) + values
        intensity = 2 * batch * values / (4 * moved)
        if intensity > 8:
            return "bmm", f"IEEE float32 at {intensity:.0f} operations a byte is bound by arithmetic"
    return "triton", "one pass over the activations per factor, without copies"
