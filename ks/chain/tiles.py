"""Tile sizes of the Triton kernels: pure functions of sizes, no torch.

They fit the 99 KiB of shared memory that every GPU of compute capability 8.0 or more gives a program, and keep at most
64 float32 sums a thread on four warps. `bits` is the size of one element of x. No GPU has measured them
(docs/performance.md).
"""

from math import ceil
from typing import NamedTuple

from ks.chain.patterns import Pattern

GROUP = 4  # neighbouring t that one program takes
ROWS = 64  # features of b in a tile: the M side of wgmma
SAMPLES = 32  # of a tile of the factor kernel, and the columns of one of the gradient's: the N side
PROGRAMS = 256  # enough to fill a large GPU (132 to 148 multiprocessors) once or twice
ALIGNED = 16  # b, c and batch are multiples of it: Triton knows of no smaller alignment, and loads singly without one


class FactorTiles(NamedTuple):
    """A program writes `rows` rows of y, tile after tile of `cols` columns, in `stages` of loads at a time."""

    rows: int
    cols: int
    stages: int


class GradientTiles(NamedTuple):
    """A program sums `part` samples, `samples` at a time; a batch of more samples has several parts."""

    samples: int
    part: int


def held(bits: int) -> int:
    """Return the most columns of a factor for which a program holds its whole tile of x."""
    return 1024 // bits


def factor_tiles(pattern: Pattern, batch: int, bits: int) -> FactorTiles:
    """Return the tiles of y = K x for a factor of `pattern`, d a multiple of GROUP.

    A program holds its tile of x and writes as many rows as still fill the GPU, if c is small enough; otherwise one
    tile of them.
    """
    a, b, c, d = pattern
    if c > held(bits):
        return FactorTiles(ROWS, 512 // bits, stages=3)
    tiles = ceil(b / ROWS)
    programs = ceil(batch / SAMPLES) * a * d // GROUP
    shares = min(tiles, ceil(PROGRAMS / programs))
    cols = max(ALIGNED, 1 << (c - 1).bit_length())
    return FactorTiles(ceil(tiles / shares) * ROWS, cols, stages=2 if bits == 16 else 1)


def gradient_tiles(pattern: Pattern, batch: int, bits: int) -> GradientTiles:
    """Return the tiles and parts of the gradient of a factor's values; arguments as in `factor_tiles`."""
    a, b, c, d = pattern
    samples = 512 // bits
    programs = a * d // GROUP * ceil(b / ROWS) * ceil(c / SAMPLES)
    parts = max(1, min(PROGRAMS // programs, batch // (8 * samples)))
    return GradientTiles(samples, ceil(batch / parts / samples) * samples)


def kernels_pay(pattern: Pattern, batch: int, bits: int) -> bool:
    """Return whether the kernels take the products of a factor, where torch.bmm would copy an activation.

    One side of the factor must be so thin that a program holds it: then every activation is read and written once.
    """
    aligned = batch > 0 and not any(size % ALIGNED for size in (pattern.b, pattern.c, batch))
    return aligned and pattern.d % GROUP == 0 and bits <= 32 and min(pattern.b, pattern.c) <= held(bits)
