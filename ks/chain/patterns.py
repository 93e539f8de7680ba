"""Kronecker-sparse patterns and the rank-r chains built from them: integers only, no torch.

A pattern (a, b, c, d) is the support I_a ⊗ 1_{b×c} ⊗ I_d of a factor with a·b·d rows and a·c·d columns.
A chain W ≈ K_1 … K_L of an m × n weight is fixed by its row splits m = m_1⋯m_L, its column splits
n = n_1⋯n_L and a rank r; `patterns[0]` is the output side, `patterns[-1]` touches x first.

Source: Le, Zheng, Riccietti, Gribonval, "Butterfly factorization with error guarantees" (2024), for patterns and
chainability; Dao et al., "Monarch" (ICML 2022), for the two-factor family.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt, prod
from typing import NamedTuple

from ks.errors import UsageError

FAMILIES = ("monarch", "lowrank", "butterfly", "lowrank_butterfly")


class Pattern(NamedTuple):
    """Support I_a ⊗ 1_{b×c} ⊗ I_d of one factor: (a·b·d) × (a·c·d) with a·b·c·d free values."""

    a: int
    b: int
    c: int
    d: int

    @property
    def rows(self) -> int:
        return self.a * self.b * self.d

    @property
    def cols(self) -> int:
        return self.a * self.c * self.d

    @property
    def numel(self) -> int:
        return self.a * self.b * self.c * self.d

    def __str__(self) -> str:
        return f"({self.a}, {self.b}, {self.c}, {self.d})"


def check_patterns(patterns) -> tuple[Pattern, ...]:
    """Check patterns (positive integers, consecutive sizes match) and return them as a tuple of `Pattern`.

    Args:
        patterns: iterable of (a, b, c, d), output side first.
    Raises:
        UsageError: empty chain, a pattern that is not four positive integers, or sizes that do not match.
    """
    checked = []
    for entry in patterns:
        entry = tuple(entry)
        if len(entry) != 4 or not all(isinstance(value, int) and value > 0 for value in entry):
            raise UsageError(f"pattern {entry}: four positive integers (a, b, c, d) are needed")
        checked.append(Pattern(*entry))
    if not checked:
        raise UsageError("an empty chain: at least one pattern (a, b, c, d) is needed")
    for left, right in pairwise(checked):
        if left.cols != right.rows:
            raise UsageError(
                f"patterns {left} and {right} do not fit: {left.cols} columns (a·c·d) meet {right.rows} rows (a·b·d)"
            )
    return tuple(checked)


def chainability(left: Pattern, right: Pattern) -> int | None:
    """Return the chainability number a_1·c_1 / a_2 = b_2·d_2 / d_1 of two neighbours, or None if not chainable.

    It is the rank of the blocks of the product of the two factors. Chainable means: the sizes match, a_1 divides a_2,
    d_2 divides d_1 and the number is a whole one.
    Source: Le et al. 2024, definition of chainable patterns.
    """
    if left.cols != right.rows or right.a % left.a or left.d % right.d or (left.a * left.c) % right.a:
        return None
    return left.a * left.c // right.a


def _largest_divisor(number: int, limit: int) -> int:
    small = [k for k in range(1, isqrt(number) + 1) if number % k == 0]
    return max(k for k in (*small, *(number // k for k in small)) if k <= limit)


@dataclass(frozen=True)
class Chain:
    """One family of chains over every rank: the splits stay, the rank varies, so that models are nested.

    pattern_l = (N_{<l}, m_l·r_{l-1}, n_l·r_l, M_{>l}) with N_{<l} = n_1⋯n_{l-1}, M_{>l} = m_{l+1}⋯m_L, r_0 = r_L = 1.

    Args:
        family: 'monarch', 'lowrank', 'butterfly', 'explicit' or 'lowrank_butterfly'.
        rows: m, the weight's rows (output features).
        cols: n, the weight's columns (input features).
        row_splits: (m_1, …, m_L), product m; empty for lowrank_butterfly, which no splits describe.
        col_splits: (n_1, …, n_L), product n; likewise.
    Raises:
        UsageError: splits of different lengths, not positive, or of another product than the shape's.
    """

    family: str
    rows: int
    cols: int
    row_splits: tuple[int, ...] = ()
    col_splits: tuple[int, ...] = ()

    def __post_init__(self):
        if self.family == "lowrank_butterfly":
            return
        if len(self.row_splits) != len(self.col_splits) or len(self.row_splits) < 2:
            raise UsageError(
                f"row splits {list(self.row_splits)} and column splits {list(self.col_splits)}: "
                "give the same number of each, at least two"
            )
        for name, splits, size in (("row", self.row_splits, self.rows), ("column", self.col_splits, self.cols)):
            if min(splits) < 1 or prod(splits) != size:
                raise UsageError(
                    f"{name} splits {list(splits)} multiply to {prod(splits)}: "
                    f"positive integers with product {size} (the weight is {self.rows} × {self.cols}) are needed"
                )

    @property
    def num_splits(self) -> int:
        """L − 1, the number of cuts, each with a rank of its own."""
        return max(len(self.row_splits) - 1, 0)

    def block_shape(self, split: int) -> tuple[int, int, int, int]:
        """Return the sizes (M_{≤l}, M_{>l}, N_{≤l}, N_{>l}) of split l = 1 … L − 1.

        Cutting there leaves M_{>l}·N_{≤l} blocks of W of size M_{≤l} × N_{>l}, each of rank r_l in the chain.
        """
        return (
            prod(self.row_splits[:split]),
            prod(self.row_splits[split:]),
            prod(self.col_splits[:split]),
            prod(self.col_splits[split:]),
        )

    @property
    def saturation_rank(self) -> int:
        """The rank max_l min(M_{≤l}, N_{>l}) above which a larger rank changes nothing."""
        if not self.row_splits:
            square = self.rows == self.cols and self.rows & (self.rows - 1) == 0
            return 1 if square else min(self.rows, self.cols)
        limits = (self.block_shape(split) for split in range(1, self.num_splits + 1))
        return max(min(height, width) for height, _, _, width in limits)

    def ranks(self, rank: int) -> tuple[int, ...]:
        """Return the effective ranks r_l = min(rank, M_{≤l}, N_{>l}) for l = 1 … L − 1 (clipped at saturation)."""
        _check_rank(rank)
        blocks = (self.block_shape(split) for split in range(1, self.num_splits + 1))
        return tuple(min(rank, height, width) for height, _, _, width in blocks)

    def patterns(self, rank: int) -> tuple[Pattern, ...]:
        """Return the patterns of the rank-`rank` chain, output side first; sizes match by construction.

        Raises:
            UsageError: rank is not a positive integer.
        """
        if self.family == "lowrank_butterfly":
            _check_rank(rank)
            return _lowrank_butterfly_patterns(self.rows, self.cols, min(rank, self.saturation_rank))
        return patterns_of_ranks(self.row_splits, self.col_splits, self.ranks(rank))

    def parameters(self, rank: int) -> int:
        """Return the number of free values Σ a·b·c·d of the rank-`rank` chain."""
        return sum(pattern.numel for pattern in self.patterns(rank))

    def parity_rank(self) -> int | None:
        """Return the smallest rank with at least as many parameters as the dense weight, or None if none has."""
        ranks = range(1, self.saturation_rank + 1)
        index = bisect_left(ranks, self.rows * self.cols, key=self.parameters)
        return ranks[index] if index < len(ranks) else None

    def notes(self) -> list[str]:
        """Return remarks that a reader of a study on this chain needs, one sentence each; usually none."""
        size = f"{self.rows} × {self.cols} weight"
        if self.family == "lowrank_butterfly":
            if self.saturation_rank == 1 < self.rows:
                return [f"lowrank_butterfly on a square {size}: the rank has no effect"]
            return ["lowrank_butterfly is the chain of the 2025 ksmm study, for comparison; it is exactly rank-r"]
        if self.family == "monarch" and 1 in (self.row_splits[-1], self.col_splits[0]):
            q, p = self.row_splits[-1], self.col_splits[0]
            degree = "plain low-rank" if q == p == 1 else "partly low-rank"
            return [f"a {q} × {p} grid of blocks: monarch is {degree} on this {size}"]
        return []

    def describe(self) -> str:
        """Return the chain in one short line, for tables and titles."""
        if self.family == "lowrank_butterfly":
            return "lowrank_butterfly"
        splits = f"rows {'·'.join(map(str, self.row_splits))}, columns {'·'.join(map(str, self.col_splits))}"
        return f"{self.family} ({splits})"


def _check_rank(rank: int) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UsageError(f"rank {rank!r}: a positive integer is needed")


def clip_ranks(row_splits, col_splits, ranks) -> tuple[int, ...]:
    """Return the largest feasible ranks below `ranks`.

    Feasible: r_l ≤ m_l·r_{l-1} and r_l ≤ n_{l+1}·r_{l+1}; the two bounds are applied until nothing changes.
    """
    clipped = [1, *ranks, 1]
    while True:
        before = list(clipped)
        for l in range(1, len(clipped) - 1):
            clipped[l] = min(clipped[l], row_splits[l - 1] * clipped[l - 1], col_splits[l] * clipped[l + 1])
        if clipped == before:
            return tuple(clipped[1:-1])


def patterns_of_ranks(row_splits, col_splits, ranks) -> tuple[Pattern, ...]:
    """Return the patterns (N_{<l}, m_l·r_{l-1}, n_l·r_l, M_{>l}) for given splits and per-split ranks.

    Args:
        row_splits: (m_1, …, m_L).
        col_splits: (n_1, …, n_L).
        ranks: (r_1, …, r_{L-1}), positive; ranks that no chain can have are clipped (`clip_ranks`).
    Returns:
        L patterns, output side first; the chainability number of the pair (l, l + 1) is the clipped r_l.
    """
    r = (1, *clip_ranks(row_splits, col_splits, ranks), 1)
    return tuple(
        Pattern(prod(col_splits[:l]), row_splits[l] * r[l], col_splits[l] * r[l + 1], prod(row_splits[l + 1 :]))
        for l in range(len(row_splits))
    )


def _lowrank_butterfly_patterns(rows: int, cols: int, rank: int) -> tuple[Pattern, ...]:
    levels = (max(rows, cols) - 1).bit_length()
    size = 2**levels
    butterfly = [Pattern(2**l, 2, 2, 2 ** (levels - 1 - l)) for l in range(levels)]
    head = [Pattern(1, rows, rank, 1), Pattern(1, rank, size, 1)] if rows != size else []
    tail = [Pattern(1, size, rank, 1), Pattern(1, rank, cols, 1)] if cols != size else []
    return tuple(head + butterfly + tail) or (Pattern(1, 1, 1, 1),)


def make_chain(
    rows: int,
    cols: int,
    family: str = "monarch",
    *,
    blocks: int = 4,
    num_factors: int = 3,
    row_splits=None,
    col_splits=None,
) -> Chain:
    """Build a chain family.

    Args:
        rows: m, the weight's rows.
        cols: n, the weight's columns.
        family: one of `FAMILIES`; ignored when splits are given.
        blocks: for monarch, q and p are the largest divisors ≤ blocks of m and n.
        num_factors: for butterfly, L; needs L − 1 ≤ the power of two in m and in n.
        row_splits, col_splits: both, for an explicit chain.
    Raises:
        UsageError: sides < 1, unknown family, blocks < 1, too many butterfly factors, or splits that do not fit.
    """
    if rows < 1 or cols < 1:
        raise UsageError(f"a chain for a {rows} × {cols} weight: both sides must be at least 1")
    if row_splits is not None or col_splits is not None:
        if row_splits is None or col_splits is None:
            raise UsageError("row_splits and col_splits go together: one of them is missing")
        return Chain("explicit", rows, cols, tuple(row_splits), tuple(col_splits))
    if family == "monarch":
        if blocks < 1:
            raise UsageError(f"blocks {blocks}: at least 1 is needed")
        q, p = _largest_divisor(rows, blocks), _largest_divisor(cols, blocks)
        return Chain(family, rows, cols, (rows // q, q), (p, cols // p))
    if family == "lowrank":
        return Chain(family, rows, cols, (rows, 1), (1, cols))
    if family == "butterfly":
        if num_factors < 2:
            raise UsageError(f"num_factors {num_factors}: at least 2 is needed")
        halvings = num_factors - 1
        allowed = min((side & -side).bit_length() - 1 for side in (rows, cols))  # halvings that both sides have
        if halvings > allowed:
            remedy = f"at most {allowed + 1} factors, or the chain monarch" if allowed else "the chain monarch"
            raise UsageError(
                f"a butterfly of {num_factors} factors needs sides divisible by {2**halvings}, not {rows} × {cols}; "
                f"use {remedy}"
            )
        twos = (2,) * halvings
        return Chain(family, rows, cols, (rows >> halvings, *twos), (*twos, cols >> halvings))
    if family == "lowrank_butterfly":
        return Chain(family, rows, cols)
    raise UsageError(f"chain {family!r}: choose one of {', '.join(FAMILIES)}")
