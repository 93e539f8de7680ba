"""Factorisation of a weight into a chain, and its loss for any rank.

Source: Le, Zheng, Riccietti, Gribonval, "Butterfly factorization with error guarantees" (2024).
"""

from itertools import pairwise

import torch

from ks.bounds.descent import GRID_TOLERANCE, GridDescent, refine_factors
from ks.bounds.low_rank import low_rank_factors
from ks.bounds.tails import tail_energies
from ks.chain.bmm import empty_values
from ks.chain.patterns import Chain, Pattern, chainability, check_patterns
from ks.errors import UsageError
from ks.moments.metric import Metric, MetricLike


class HierarchicalLoss:
    """The loss of the left-to-right factorisation of W as a function of the rank; all ranks share the first cut's SVD.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA.
        chain: with a floor (`ks.bounds.floors.no_floor_reason`).
    """

    def __init__(self, weight: torch.Tensor, chain: Chain):
        self.chain, weight = chain, weight.detach()
        self.energy = weight.double().square().sum().item()
        self.first = _split_svd(weight.double().unsqueeze(0), chain.patterns(1)[0], 1)

    def __call__(self, rank: int) -> float:
        """Return the squared error per output on unit inputs, ‖W − K_1 … K_L‖_F² / m."""
        patterns, ranks = self.chain.patterns(rank), self.chain.ranks(rank)
        remainder = _remainder_at(self.first, ranks[0])
        for pattern, split_rank in zip(patterns[1:-2], ranks[1:-1]):
            remainder = _remainder_at(_split_svd(remainder, pattern, split_rank), split_rank)
        # Left factors are orthonormal per block, so lost energies add up; the last cut needs no singular vectors.
        lost = self.energy - remainder.square().sum().item()
        lost += tail_energies(_remainder_blocks(remainder, patterns[-2], ranks[-1]))[ranks[-1] :][:1].sum().item()
        return max(0.0, lost) / self.chain.rows


@torch.no_grad()
def factorize(
    weight: torch.Tensor, patterns, metric: MetricLike = None, *, tolerance: float = GRID_TOLERANCE
) -> list[torch.Tensor]:
    """Factorise W into a chainable chain, so that tr(G E C Eᵀ) is small for E = W − Ŵ.

    Where C couples none of the column groups of the right-most factor (C = I, which is the default; any C for low-rank
    chains), the factorisation is hierarchical from left to right and optimal for two factors: at split l the best
    rank-r_l approximation of every block gives K_l (orthonormal columns per block) and the remainder that the next
    factors approximate. If singular values are tied at a cut, the result for more than two factors depends on the
    choice of the SVD. For any other C, two factors are a local optimum of block coordinate descent; more factors start
    from the descent at every split and are refined by a descent over factors.

    Where G couples none of the row groups t::q of the left-most factor, q = d_1, all of this is done for G^{1/2} W, and
    G_tt^{-1/2}, a pseudo-inverse if need be, goes into the blocks of that factor; low-rank chains need a root of G or C
    of their smaller side alone. Any other G takes descents too.

    Other moments than I cost one eigendecomposition of C, about 10 n³ operations. Coupled inputs cost another 4 n³/p +
    4 m n² + 100 · (6 r q n² + 8 r m n) for two factors, with q row groups (5 seconds for 384 × 1536 and half a minute
    for 1024 × 4096 at rank 32 and q = 4, on one thread), and up to 50 · 4 m n² more for more factors.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA; the work is done in float64.
        patterns: (a, b, c, d) output side first, with a_1 = 1, d_L = 1, neighbours chainable.
        metric: C = E[x xᵀ], a tensor of shape (n, n) or a `SecondMoment`; or a `Metric`, G ⊗ C. None means I.
        tolerance: relative progress of a sweep at which the descent for coupled inputs ends.
    Returns:
        values of shape (a_l, b_l, c_l, d_l), output side first, dtype and device of the weight.
    Raises:
        UsageError: patterns that are not of that kind, or of another size than the weight; C or G of another size, not
            symmetric or not positive semi-definite.
    """
    patterns = check_patterns(patterns)
    check_shape(weight, (patterns[0].rows, patterns[-1].cols))
    ranks = _chain_ranks(patterns)
    metric = Metric.of(metric)
    metric.check_shape(weight)
    row_groups, column_groups = patterns[0].d, patterns[-1].a
    coupled = metric.couples(row_groups, column_groups)
    if len(patterns) == 2 and coupled:
        left, right = GridDescent(weight, metric, row_groups, column_groups).factors(ranks[0], tolerance=tolerance)
        values = _two_factors(left, right.mT, patterns, ranks[0])
    elif len(patterns) == 2 and row_groups == column_groups == 1:
        left, right = low_rank_factors(weight, metric, ranks[0])
        values = _two_factors(left[None, None], right[None, None], patterns, ranks[0])
    else:
        values = _hierarchical(weight, metric, patterns, ranks, tolerance)
        if coupled:
            values, _ = refine_factors(weight.double(), metric, values)
    stored = [empty_values(pattern, weight.device, weight.dtype) for pattern in patterns]
    return [place.copy_(factor) for place, factor in zip(stored, values)]


def _two_factors(left: torch.Tensor, right: torch.Tensor, patterns, rank: int) -> list[torch.Tensor]:
    """Return the values of two factors from blocks left · right, shapes (q, p, M, kept) and (q, p, kept, k)."""
    value, rest = _placed(left[None], right[None], rank)
    return [value, rest.reshape(*patterns[1])]


def _hierarchical(weight: torch.Tensor, metric: Metric, patterns, ranks, tolerance: float) -> list[torch.Tensor]:
    """Return the factors of left-to-right cuts, made without what G couples between row groups."""
    metric = metric.without_row_coupling(patterns[0].d)
    wide, moment = metric.weighted(weight), metric.inputs.coupling(patterns[-1].a)
    if moment is None:
        values = _cuts(wide, metric.inputs.times_root(wide), patterns, ranks)
    else:
        values = _coupled_cuts(wide, moment.to(weight.device), patterns, ranks, tolerance)
    _, b, c, d = values[0].shape
    columns = metric.unweighted(values[0].transpose(2, 3).reshape(b * d, c))  # (b d) c
    values[0] = columns.reshape(1, b, d, c).transpose(2, 3)
    return values


def _cuts(weight: torch.Tensor, rooted: torch.Tensor, patterns, ranks) -> list[torch.Tensor]:
    """Return factors with columns from SVDs of W C^{1/2}; the last remainder is a projection of W itself."""
    remainder, rooted = weight.unsqueeze(0), rooted.unsqueeze(0)  # shape: (a, r·M, N), of each column block
    values = []
    for pattern, rank in zip(patterns, ranks):
        left, singular, right = _split_svd(rooted, pattern, rank)
        left, rest = left[..., :rank], (singular.unsqueeze(-1) * right)[..., :rank, :]
        projected = left.mT @ _remainder_blocks(remainder, pattern, rank)
        value, rooted = _placed(left, rest, rank)
        values.append(value)
        remainder = _placed(left, projected, rank)[1]
    return [*values, remainder.reshape(*patterns[-1])]


def _coupled_cuts(weight: torch.Tensor, moment: torch.Tensor, patterns, ranks, tolerance: float) -> list[torch.Tensor]:
    """Return the factors of descents at every split; those behind the first drop the coupling of its column blocks."""
    remainder, values = weight.unsqueeze(0), []  # shape: (a, r·M, N), of each column block
    for pattern, rank in zip(patterns, ranks):
        width = remainder.shape[-1]
        blocks = [
            GridDescent(block, moment[start : start + width, start : start + width], pattern.d, pattern.c // rank)
            for block, start in zip(remainder, range(0, len(moment), width))
        ]
        left, right = map(torch.stack, zip(*(block.factors(rank, tolerance=tolerance) for block in blocks)))
        value, remainder = _placed(left, right.mT, rank)
        values.append(value)
    return [*values, remainder.reshape(*patterns[-1])]


def _chain_ranks(patterns: tuple[Pattern, ...]) -> list[int]:
    if patterns[0].a != 1 or patterns[-1].d != 1:
        raise UsageError(
            f"patterns {patterns[0]} … {patterns[-1]}: the first must have a = 1 and the last d = 1 to be factorised"
        )
    ranks = []
    for left, right in pairwise(patterns):
        rank = chainability(left, right)
        if rank is None:
            raise UsageError(f"patterns {left} and {right} are not chainable: their product has no blocks of one rank")
        ranks.append(rank)
    return ranks


def _remainder_blocks(remainder: torch.Tensor, pattern: Pattern, rank: int) -> torch.Tensor:
    """Return the blocks (a, d, c/r, b, width) that the cut behind one factor makes of a remainder (a, b·d, ·)."""
    a, b, c, d = pattern
    # a (b d) (c/r width) -> a d c/r b width
    return remainder.reshape(a, b, d, c // rank, -1).permute(0, 2, 3, 1, 4)


def _split_svd(remainder: torch.Tensor, pattern: Pattern, rank: int):
    """Return left, singular values and right of the blocks of a cut."""
    return torch.linalg.svd(_remainder_blocks(remainder, pattern, rank), full_matrices=False)


def _remainder_at(svd, rank: int) -> torch.Tensor:
    """Return the remainder for the next factors from the SVD of the blocks of a cut."""
    left, singular, right = svd
    return _placed(left[..., :rank], singular[..., :rank, None] * right[..., :rank, :], rank)[1]


def _placed(left: torch.Tensor, rest: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of a factor and the remainder for the next ones from products left · rest of blocks.

    left: shape (a, d, c/r, b, kept), and rest (a, d, c/r, kept, width), with kept ≤ r; zeros fill the rank up.
    """
    a, d, inner, b, kept = left.shape
    factor = torch.nn.functional.pad(left, (0, rank - kept))
    rest = torch.nn.functional.pad(rest, (0, 0, 0, rank - kept))
    # a d inner b rank -> a b (inner rank) d
    values = factor.permute(0, 3, 2, 4, 1).reshape(a, b, inner * rank, d)
    # a d inner rank width -> (a inner) (rank d) width
    return values, rest.permute(0, 2, 3, 1, 4).reshape(a * inner, rank * d, -1)


def check_shape(weight: torch.Tensor, expected: tuple[int, int]) -> None:
    if tuple(weight.shape) != expected:
        raise UsageError(f"weight of shape {tuple(weight.shape)}: this chain needs a weight of shape {expected}")
