"""Tile rules of the Triton kernels: pure functions of sizes, no torch.

`bits` is the size of one element of x, `arch` ten times the compute capability of the GPU (80, 90, 100, …).
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from ks.patterns import Pattern

SMALLEST = 16  # of a side of a matrix product on tensor cores
PROGRAMS = 256  # enough to fill a large GPU (132 to 148 multiprocessors) once or twice
SHARED_KIB = {80: 163, 90: 227, 100: 227}  # for one program; every other architecture has at least 99


@dataclass(frozen=True)
class Tiles:
    """Sizes of one program's tile: `batch` samples, `rows` of b, `cols` of c, `group` neighbouring t.

    In a gradient of values the batch is cut into `parts`, each summed by a program of its own.
    """

    batch: int
    rows: int
    cols: int
    group: int = 1
    warps: int = 4
    stages: int = 3
    parts: int = 1


def _power_of_two(number: int, low: int, high: int) -> int:
    """Return the smallest power of two ≥ number, clipped to low … high."""
    return max(low, min(1 << (number - 1).bit_length(), high))


def _operands_stay_in_shared_memory(bits: int, arch: int) -> bool:
    """Return whether tensor cores read operands from shared memory (wgmma, tcgen05), so that larger tiles fit."""
    return bits == 16 and arch in (90, 100)


def _stages(elements: int, bits: int, arch: int) -> int:
    """Return the deepest load pipeline, at most 3, whose steps of this many elements fit into shared memory."""
    return max(1, min(3, SHARED_KIB.get(arch, 99) * 1024 // (elements * bits // 8)))


def group_of(d: int) -> int:
    """Return how many neighbouring t, which share memory sectors, one program takes: the largest of 4, 2, 1 in d."""
    return 4 if d % 4 == 0 else 2 if d % 2 == 0 else 1


@lru_cache(maxsize=1024)
def factor_tiles(pattern: Pattern, batch: int, bits: int, interleaved: bool, arch: int) -> Tiles:
    """Return the tiles of y = K x for a factor of `pattern`.

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


@lru_cache(maxsize=1024)
def gradient_tiles(pattern: Pattern, batch: int, bits: int, interleaved: bool, arch: int) -> Tiles:
    """Return the tiles and parts of the values' gradient of a factor; arguments as in `factor_tiles`."""
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
