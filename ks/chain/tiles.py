"""Tile rules of the Triton kernels, and the bytes that a launch moves: pure functions of sizes, no torch.

`bits` is the size of one element of x, `arch` ten times the compute capability of the GPU (80, 90, 100, …).
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

from ks.chain.patterns import Pattern

GROUP = 4  # neighbouring t that one program takes
ROWS = 64  # features of b in a tile: the M side of wgmma
SMALLEST = 32  # samples or columns of a tile, the N side
PROGRAMS = 256  # enough to fill a large GPU (132 to 148 multiprocessors) once or twice
SHARED_KIB = {80: 163, 90: 227, 100: 227}  # for one program; every other architecture has at least 99
WHOLE = 16  # b, c and batch are multiples of it: Triton knows of no smaller alignment, and loads singly without one
SECTOR_BITS = 256  # the unit in which a GPU moves memory
MOST_TRAFFIC = 2  # L2 bytes of a launch over its DRAM bytes


@dataclass(frozen=True)
class Tiles:
    """Sizes of one program's tile: `batch` samples, `rows` of b, `cols` of c, for GROUP neighbouring t.

    A program of the factor kernel writes `rows_of_share` rows, tile after tile. In a gradient of values a program sums
    `samples_of_part` samples, and a batch of more has several parts.
    """

    batch: int
    rows: int
    cols: int
    warps: int
    stages: int
    rows_of_share: int = 0
    samples_of_part: int = 0


class Traffic(NamedTuple):
    """Bytes that a launch moves between multiprocessors and L2, and at least between L2 and memory."""

    l2: int
    dram: int

    @property
    def is_low(self) -> bool:
        return self.l2 <= MOST_TRAFFIC * self.dram


def _power_of_two(number: int, low: int, high: int) -> int:
    """Return the smallest power of two ≥ number, clipped to low … high."""
    return max(low, min(1 << (number - 1).bit_length(), high))


def _warps(sums: int) -> int:
    """Return the warps of a program with this many sums: at most 64 float32 a thread where 8 warps suffice for that."""
    return _power_of_two(ceil(sums / (64 * 32)), 4, 8)


def _stages(step: int, fixed: int, steps: int, arch: int) -> int:
    """Return the deepest load pipeline, at most 3 and no deeper than the loop, that fits into shared memory.

    Args:
        step: bytes that one step of the loop loads.
        fixed: bytes that stay beside them.
        steps: of the loop.
        arch: architecture.
    """
    return max(1, min(3, steps, (_shared_bytes(arch) - fixed) // step))


def _shared_bytes(arch: int) -> int:
    return SHARED_KIB.get(arch, 99) * 1024


def _largest_operand(bits: int, arch: int) -> int:
    """Return the largest tile of x, samples times features, for which no kernel spilled registers.

    Tensor cores of Hopper and Blackwell (wgmma, tcgen05) read operands from shared memory, others from registers.
    """
    return 32 * (128 if bits == 16 and arch in (90, 100) else 32)


def _widest_beside_rows(bits: int, arch: int) -> int:
    return max(SMALLEST, _largest_operand(bits, arch) // ROWS)


@lru_cache(maxsize=1024)
def factor_tiles(pattern: Pattern, batch: int, bits: int, arch: int) -> Tiles:
    """Return the tiles of y = K x for a factor of `pattern`.

    A program holds its tile of x and writes all rows of its share, if c is small enough; otherwise it writes one tile.
    Shares fill the GPU as far as the traffic stays low.

    Args:
        pattern: (a, b, c, d), d a multiple of GROUP.
        batch: number of samples.
        bits: 16 or 32.
        arch: architecture.
    """
    a, b, c, d = pattern
    samples = _power_of_two(batch, SMALLEST, 1024 // bits)
    cols, item = _power_of_two(c, 16, _largest_operand(bits, arch) // SMALLEST), GROUP * bits // 8
    if c > cols:
        samples, cols = min(samples, _widest_beside_rows(bits, arch)), 512 // bits
        stages = _stages((samples + ROWS) * cols * item, 0, ceil(c / cols), arch)
        return Tiles(samples, ROWS, cols, _warps(samples * ROWS * GROUP), stages, rows_of_share=ROWS)
    samples = min(samples, _largest_operand(bits, arch) // cols)
    tiles_j = ceil(b / ROWS)
    shares = min(tiles_j, ceil(PROGRAMS / (ceil(batch / samples) * a * d // GROUP)))

    def in_shares(shares: int) -> Tiles:
        steps = ceil(tiles_j / shares)
        stages = _stages(ROWS * cols * item, (cols + ROWS) * samples * item, steps, arch)
        return Tiles(samples, ROWS, cols, _warps(samples * ROWS * GROUP), stages, rows_of_share=steps * ROWS)

    while shares > 1 and not factor_traffic(pattern, batch, bits, in_shares(shares)).is_low:
        shares -= 1
    return in_shares(shares)


@lru_cache(maxsize=1024)
def gradient_tiles(pattern: Pattern, batch: int, bits: int, arch: int) -> Tiles:
    """Return the tiles and parts of the values' gradient of a factor; arguments as in `factor_tiles`."""
    a, b, c, d = pattern
    cols = _power_of_two(c, SMALLEST, _widest_beside_rows(bits, arch))
    samples = 32 if bits == 16 else 16
    programs = a * d // GROUP * ceil(b / ROWS) * ceil(c / cols)
    parts = max(1, min(PROGRAMS // programs, batch // (8 * samples)))

    def in_parts(parts: int) -> Tiles:
        steps = ceil(batch / parts / samples)
        stages = _stages((ROWS + cols) * samples * GROUP * bits // 8, 0, steps, arch)
        return Tiles(samples, ROWS, cols, _warps(ROWS * cols * GROUP), stages, samples_of_part=steps * samples)

    while parts > 1 and not gradient_traffic(pattern, batch, bits, in_parts(parts)).is_low:
        parts -= 1
    return in_parts(parts)


def factor_traffic(
    pattern: Pattern, batch: int, bits: int, tile: Tiles, x_interleaved: bool = False, y_interleaved: bool = False
) -> Traffic:
    """Return the bytes of y = K x.

    Args:
        pattern, batch, bits: as in `factor_tiles`.
        tile: of the launch.
        x_interleaved, y_interleaved: whether neighbouring t, and not samples, are contiguous in x, and in y.
    """
    a, b, c, d = pattern
    x, values, y = (size * bits // 8 for size in (batch * pattern.cols, a * b * c * d, batch * pattern.rows))
    reads_of_x = ceil(b / tile.rows_of_share)
    l2 = x * reads_of_x * _sectors(d, bits, x_interleaved) + y * _sectors(d, bits, y_interleaved)
    return Traffic(int(l2 + values * ceil(batch / tile.batch)), x + values + y)


def gradient_traffic(
    pattern: Pattern, batch: int, bits: int, tile: Tiles, x_interleaved: bool = False, y_interleaved: bool = False
) -> Traffic:
    """Return the bytes of the values' gradient, sums of the parts included; arguments as in `factor_traffic`."""
    a, b, c, d = pattern
    x, y = (batch * size * bits // 8 for size in (pattern.cols, pattern.rows))
    out = 4 * a * b * c * d
    l2 = x * ceil(b / tile.rows) * _sectors(d, bits, x_interleaved)
    l2 += y * ceil(c / tile.cols) * _sectors(d, bits, y_interleaved)
    parts = ceil(batch / tile.samples_of_part)
    return Traffic(int(l2 + (out if parts == 1 else (2 * parts + 1) * out)), x + y + out)


def _sectors(d: int, bits: int, interleaved: bool) -> float:
    """Return the bytes in the sectors that a program touches over those that it needs: it takes GROUP of every d."""
    return max(1.0, min(d * bits, SECTOR_BITS) / (GROUP * bits)) if interleaved else 1.0


def kernels_pay(
    pattern: Pattern, batch: int, bits: int, arch: int, *, x_interleaved: bool, y_interleaved: bool
) -> tuple[bool, bool]:
    """Return whether the launches of the forward pass, and those of the backward pass, of a factor keep L2 traffic low.

    Both launches of a backward pass must, because one copy of the gradient serves both products of `torch.bmm`.

    Args:
        pattern, batch, bits, arch: as in `factor_tiles`, but any d and bits; `torch.bmm` keeps float64, and sizes that
            are no multiples of WHOLE.
        x_interleaved, y_interleaved: as in `factor_traffic`.
    """
    a, b, c, d = pattern
    if d % GROUP or bits > 32 or any(size % WHOLE for size in (b, c, batch)):
        return False, False
    sizes, transposed = (pattern, batch, bits), (Pattern(a, c, b, d), batch, bits)
    forward = factor_traffic(*sizes, factor_tiles(*sizes, arch), x_interleaved, y_interleaved)
    backward = factor_traffic(*transposed, factor_tiles(*transposed, arch), y_interleaved, x_interleaved)
    values = gradient_traffic(*sizes, gradient_tiles(*sizes, arch), x_interleaved, y_interleaved)
    return forward.is_low, backward.is_low and values.is_low
