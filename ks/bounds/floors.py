"""Floors: bounds on the least loss that any chain of a rank can have.

Split l of a chain cuts W (m × n) into M_{>l}·N_{≤l} blocks B[t, i] = W[t::M_{>l}, i·N_{>l}:(i+1)·N_{>l}] of size
M_{≤l} × N_{>l}, each of rank r_l in any chain. With E_l² the sum over the blocks of the squared singular values beyond
the r_l-th,

    max_l E_l  ≤  min ‖W − K_1 … K_L‖_F  ≤  left-to-right hierarchical factorisation  ≤  √(Σ_l E_l²),

and all four are equal for two factors. A floor is a squared error per output, E² / m. For inputs whose second moment C
is block diagonal over the column groups of the right-most factor, W stands for W C^{1/2}: C can be folded into that
factor. That includes C = σ²I, and every C for low-rank chains. Any other C couples the groups; then the lower bound is
that of `ks.bounds.lower_bound`, and the upper one the loss of the best chain that a descent finds.

Under a metric G ⊗ C, G^{1/2} W stands for W where G couples none of the row groups t::q of the left-most factor, as for
low-rank chains, whose q is 1: G_tt^{1/2} can be folded into that factor.

Source: Le, Zheng, Riccietti, Gribonval, "Butterfly factorization with error guarantees" (2024).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose

import torch

from ks.bounds.descent import GRID_TOLERANCE, GridDescent
from ks.bounds.factorize import HierarchicalLoss, check_shape, factorize
from ks.bounds.lift_and_shift import never
from ks.bounds.low_rank import low_rank_energies
from ks.bounds.lower_bound import CoupledLowerBound, Expired, isotropic_joint_bound
from ks.bounds.population_loss import residual
from ks.bounds.tails import tail_energies
from ks.chain.patterns import Chain
from ks.errors import UsageError
from ks.moments.metric import Metric, MetricLike

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Floor:
    """Bounds on the least loss of the chains of one rank, in squared error per output.

    lower: no chain of that rank has a smaller loss. upper: the loss of the best chain known, that of
    `ks.bounds.factorize.factorize`. exact: the two are equal up to rounding, so that either is the
    optimum; the one rule for this.
    """

    rank: int
    lower: float
    upper: float
    exact: bool

    @classmethod
    def between(cls, rank: int, lower: float, upper: float, predict_zero_loss: float) -> "Floor":
        """Return the floor that two bounds make; the losses are in the unit of `predict_zero_loss`."""
        exact = isclose(lower, upper, rel_tol=1e-6, abs_tol=1e-14 * predict_zero_loss)
        return cls(rank, min(lower, upper), upper, exact)


def no_floor_reason(chain: Chain) -> str | None:
    """Return why a chain family has no floor, or None if it has one."""
    if chain.family == "lowrank_butterfly":
        return "neighbours in a lowrank_butterfly are not all chainable with one rank; only its rank-r SVD bounds it"
    return None


def is_low_rank(chain: Chain) -> bool:
    """Return whether a chain has two factors and one block."""
    return chain.num_splits == 1 and chain.block_shape(1) == (chain.rows, 1, 1, chain.cols)


def split_blocks(weight: torch.Tensor, chain: Chain, split: int) -> torch.Tensor:
    """Return the blocks of split l, a view of W.

    Args:
        weight: shape (m, n).
        chain: with row and column splits.
        split: l in 1 … L − 1.
    Returns:
        shape (M_{>l}, N_{≤l}, M_{≤l}, N_{>l}).
    """
    height, outer, inner, width = chain.block_shape(split)
    return weight.reshape(height, outer, inner, width).permute(1, 2, 0, 3)


class UncoupledBounds:
    """Bounds for a metric that couples no row groups of the left-most factor and no column groups of the right-most."""

    def __init__(self, weight: torch.Tensor, chain: Chain, metric: Metric, progress: Progress):
        self.given, self.chain, self.metric, self.progress = weight, chain, metric, progress
        self.curve_is_exact = chain.num_splits == 1

    @cached_property
    def weight(self) -> torch.Tensor:
        """G^{1/2} W C^{1/2}, which stands for W."""
        return self.metric.inputs.times_root(self.metric.weighted(self.given))

    @cached_property
    def _hierarchical(self) -> HierarchicalLoss:
        return HierarchicalLoss(self.weight, self.chain)

    @cached_property
    def curve(self) -> torch.Tensor:
        """max_l E_l(r)² / m for every rank r."""
        if is_low_rank(self.chain):
            return low_rank_energies(self.given, self.metric).cpu() / self.chain.rows
        curve = torch.zeros(self.chain.saturation_rank + 1, dtype=torch.float64)
        for split in range(1, self.chain.num_splits + 1):
            self.progress(f"floors of every rank, split {split} of {self.chain.num_splits}")
            tail = tail_energies(split_blocks(self.weight, self.chain, split)).cpu()
            curve[: len(tail)] = torch.maximum(curve[: len(tail)], tail)
        return curve / self.chain.rows

    def lower(self, rank: int, tight: bool = False, expired: Expired = never) -> float:
        """Return the bound of one split, or that of all splits together if it is larger, in squared error per output.

        tight: as in `loss_floor`. expired: asked now and then; once it is true, the best bound so far is returned.
        """
        lower = self.curve[min(rank, self.chain.saturation_rank)].item()
        if self.chain.num_splits > 1 and lower > 0:
            joint = isotropic_joint_bound(self.weight, self.chain, rank, tight, expired)
            lower = max(lower, joint / self.chain.rows)
        return lower

    def upper(self, rank: int) -> float:
        """Return the loss of the hierarchical factorisation, the optimum for two factors."""
        lower = self.curve[min(rank, self.chain.saturation_rank)].item()
        return lower if self.curve_is_exact else max(lower, self._hierarchical(rank))

    def best(self, rank: int) -> tuple[float, torch.Tensor]:
        """Return the upper bound and W − Ŵ of the best known chain."""
        values = factorize(self.given.double(), self.chain.patterns(rank), self.metric)
        return self.upper(rank), residual(self.given, values)


class CoupledBounds:
    """Bounds for a metric that couples row groups of the left-most factor or column groups of the right-most one."""

    curve_is_exact = False

    def __init__(self, weight: torch.Tensor, chain: Chain, metric: Metric, tolerance: float, progress: Progress):
        self.weight, self.chain, self.metric = weight.double(), chain, metric
        self.tolerance, self.progress = tolerance, progress

    @cached_property
    def curve(self) -> torch.Tensor:
        """The largest simple bound for every rank."""
        self.progress("simple lower bounds of every rank")
        return self._lower_bound.simple / self.chain.rows

    @cached_property
    def _lower_bound(self) -> CoupledLowerBound:
        return CoupledLowerBound(self.weight, self.chain, self.metric)

    @cached_property
    def _descent(self) -> GridDescent:
        _, q, p, _ = self.chain.block_shape(1)
        return GridDescent(self.weight, self.metric, q, p)

    def lower(self, rank: int, tight: bool = False, expired: Expired = never) -> float:
        """Return the largest of the simple bound and the certificates."""
        self.progress(f"lower bound of rank {rank}")
        return self._lower_bound(rank, tight, expired) / self.chain.rows

    def upper(self, rank: int) -> float:
        """Return the loss of the best chain that a descent finds."""
        return self.best(rank)[0]

    def best(self, rank: int) -> tuple[float, torch.Tensor]:
        """Return the upper bound and W − Ŵ of the best known chain."""
        self.progress(f"upper bound of rank {rank}")
        if self.chain.num_splits == 1:
            left, right = self._descent.factors(rank, tolerance=self.tolerance)
            # q p M k -> (M q) (p k)
            error = self.weight - (left @ right.mT).permute(2, 0, 1, 3).reshape(self.weight.shape)
        else:
            error = residual(self.weight, factorize(self.weight, self.chain.patterns(rank), self.metric))
        upper = self.metric.loss(error) / self.chain.rows
        # Both are exact up to rounding where they meet.
        return max(upper, self.curve[min(rank, self.chain.saturation_rank)].item()), error


ChainBounds = UncoupledBounds | CoupledBounds


def chain_bounds(
    weight: torch.Tensor,
    chain: Chain,
    metric: MetricLike = None,
    *,
    tolerance: float = GRID_TOLERANCE,
    progress: Progress | None = None,
) -> ChainBounds:
    """Prepare the bounds of a chain family; nothing is computed before it is asked for.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA.
        chain: with a floor (`no_floor_reason`).
        metric: C = E[x xᵀ], a tensor of shape (n, n) or a `SecondMoment`; or a `Metric`, G ⊗ C. None means I.
        tolerance: relative progress of a sweep at which the descent to the upper bound of a grid ends.
        progress: called with a few words before every longer computation.
    Raises:
        UsageError: the chain has no floor, or another shape.
    """
    check_shape(weight, (chain.rows, chain.cols))
    if reason := no_floor_reason(chain):
        raise UsageError(f"no floor: {reason}")
    metric = Metric.of(metric)
    metric.check_shape(weight)
    progress = progress or (lambda text: None)
    if couples(chain, metric):
        return CoupledBounds(weight, chain, metric, tolerance, progress)
    return UncoupledBounds(weight, chain, metric, progress)


def couples(chain: Chain, metric: Metric) -> bool:
    """Return whether G couples row groups of the left-most factor, or C column groups of the right-most one."""
    return metric.couples(chain.block_shape(1)[1], chain.block_shape(chain.num_splits)[2])


def floor_curve(weight: torch.Tensor, chain: Chain, metric: MetricLike = None) -> torch.Tensor:
    """Return a lower bound for every rank r = 0 … saturation; r = 0 is the zero predictor.

    It is max_l E_l(r)² / m where the inputs couple no column groups of the right-most factor, and the optimum of
    low-rank chains under any C. For coupled inputs it is the largest simple bound
    (`ks.bounds.lower_bound.simple_bounds`), which may be several times below that of `loss_floor`.

    Args:
        weight: W, shape (m, n).
        chain: with a floor (`no_floor_reason`).
        metric: C = E[x xᵀ], a tensor of shape (n, n) or a `SecondMoment`; or a `Metric`, G ⊗ C. None means I.
    Returns:
        float64 tensor of shape (saturation rank + 1,), on the CPU.
    Raises:
        UsageError: the chain has no floor, or another shape.
    """
    return chain_bounds(weight, chain, metric).curve


def loss_floor(
    weight: torch.Tensor,
    chain: Chain,
    ranks: Sequence[int],
    metric: MetricLike = None,
    *,
    tight: bool = False,
    progress: Progress | None = None,
) -> list[Floor]:
    """Return bounds on the least loss for each rank.

    For inputs that couple column groups, a grid of q × p blocks costs about 15 n³ operations once, and for each rank
    about 100 · (6 r q n² + 8 r m n) for the upper bound and 120 m n² + 20 n³ for the lower one (four times the first
    term where p r < m/q). On one thread, 384 × 1536 takes 5 seconds once and 8 to 12 for each rank up to 48;
    1024 × 4096 takes 80 seconds once, and 40 to 80 for each rank.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA.
        chain: with a floor (`no_floor_reason`).
        ranks: positive integers; those above saturation have the bounds of saturation.
        metric: C = E[x xᵀ], a tensor of shape (n, n) or a `SecondMoment`; or a `Metric`, G ⊗ C. None means I.
        tight: spend longer on the lower bounds of coupled inputs and of more than two factors.
        progress: called with a few words before every longer computation.
    Returns:
        one `Floor` per rank, in the order given.
    Raises:
        UsageError: as `floor_curve`, no sequence of ranks, or a rank that is not a positive integer.
    """
    if isinstance(ranks, int):
        raise UsageError(f"ranks {ranks}: a sequence of ranks is needed, [{ranks}]")
    bounds = chain_bounds(weight, chain, metric, progress=progress)
    for rank in ranks:
        chain.patterns(rank)  # checks the rank
    zero = bounds.curve[0].item()
    return [Floor.between(rank, bounds.lower(rank, tight), bounds.upper(rank), zero) for rank in ranks]
