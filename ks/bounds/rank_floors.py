"""The floors of every rank of a chain family on one weight, cheap bounds first.

There are three kinds of bounds, by price: one curve of lower bounds for all ranks, a few seconds; the best known chain
of one rank, seconds each; a certified lower bound of one rank, often minutes. Only `certify` computes the last.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ks.bounds.floors import ChainBounds, Floor, Progress, chain_bounds, couples, floor_curve, no_floor_reason
from ks.bounds.lift_and_shift import never
from ks.bounds.low_rank import low_rank_energies
from ks.chain.patterns import Chain, make_chain
from ks.files.columns import ISOTROPIC
from ks.moments.metric import Metric, MetricLike

# Best known chain over simple lower bound, for a first guess; they are about as far apart on layers of MiniLM.
USUAL_RATIO = 1.2


@dataclass(frozen=True)
class Certified:
    """A certified lower bound of one rank.

    lower: relative to the zero predictor. passes: 0 if it ran out of time, 1 if it is complete, 2 if it is tight too.
    seconds: the budget of the last attempt that ran out of time.
    """

    lower: float = 0.0
    passes: int = 0
    seconds: float = 0.0


@dataclass
class KnownBounds:
    """All bounds that have been computed, relative to the zero predictor: the part of `RankFloors` that a file keeps.

    curve, isotropic: lower bounds of every rank 0 … saturation, for the inputs of the layer and for isotropic ones.
    lowrank: the same of low-rank chains of every rank 0 … min(m, n). upper: loss of the best known chain of some ranks.
    """

    curve: torch.Tensor | None = None
    isotropic: torch.Tensor | None = None
    lowrank: torch.Tensor | None = None
    upper: dict[int, float] = field(default_factory=dict)
    certified: dict[int, Certified] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetRanks:
    """The ranks around a target; every sentence about it takes them from here.

    target: loss relative to the zero predictor. none_below: no smaller rank can reach the target. reaching: the
    smallest rank whose best known chain reaches it, with the loss of that chain, which is the optimum if `exact`.
    """

    target: float
    none_below: int
    reaching: int
    loss: float
    exact: bool


class RankFloors:
    """Bounds on the least loss of every rank of a chain family on one weight, relative to the zero predictor.

    A bound is computed when it is first asked for, and kept in `known`.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA, scaled so that tr(G W C Wᵀ) = m, and the
            zero predictor loses 1.
        chain: the family, of the same shape.
        metric: C = E[x xᵀ], a tensor of shape (n, n) or a `SecondMoment`; or a `Metric`, G ⊗ C. None means I.
        isotropic_weight: returns W, scaled so that the zero predictor loses 1 on isotropic inputs, for comparison.
        known: bounds that were computed before.
        progress: called with a few words before every longer computation.
        reason: why there are no floors, if that is not the chain's doing.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        chain: Chain,
        metric: MetricLike = None,
        *,
        isotropic_weight: Callable[[], torch.Tensor] | None = None,
        known: KnownBounds | None = None,
        progress: Progress | None = None,
        reason: str | None = None,
    ):
        self.weight, self.chain, self.metric = weight, chain, Metric.of(metric)
        self.known = KnownBounds() if known is None else known
        self.isotropic_weight, self.progress = isotropic_weight, progress
        self.reason = reason or no_floor_reason(chain)

    @property
    def has_floors(self) -> bool:
        """Whether floors hold for this family; if not, `reason` has the cause."""
        return self.reason is None

    @cached_property
    def _bounds(self) -> ChainBounds:
        return chain_bounds(self.weight, self.chain, self.metric, progress=self.progress)

    @property
    def curve(self) -> torch.Tensor:
        """A lower bound of every rank 0 … saturation, float64 on the CPU; exact for two factors that no group couples.

        Raises:
            UsageError: the family has no floor.
        """
        if self.known.curve is None:
            self.known.curve = self._bounds.curve
        return self.known.curve

    @cached_property
    def curve_is_exact(self) -> bool:
        """Whether the curve is the optimum of every rank."""
        return self.chain.num_splits == 1 and not couples(self.chain, self.metric)

    @property
    def lowrank_curve(self) -> torch.Tensor:
        """The least loss of low-rank chains of every rank 0 … min(m, n), float64 on the CPU."""
        if self.chain.family == "lowrank":
            return self.curve
        if self.known.lowrank is None:
            self.known.lowrank = low_rank_energies(self.weight, self.metric).cpu() / self.chain.rows
        return self.known.lowrank

    @property
    def isotropic_curve(self) -> torch.Tensor | None:
        """The curve for isotropic inputs, for comparison; None without a weight for it."""
        if self.known.isotropic is None and self.has_floors and self.isotropic_weight is not None:
            self.known.isotropic = floor_curve(self.isotropic_weight(), self.chain)
        return self.known.isotropic

    def upper(self, rank: int) -> float:
        """Return the loss of the best known chain of a rank."""
        rank = min(rank, self.chain.saturation_rank)
        if self.curve_is_exact:
            return self.curve[rank].item()
        if rank not in self.known.upper:
            self.known.upper[rank] = self._bounds.upper(rank)
        return self.known.upper[rank]

    def lower(self, rank: int) -> float:
        """Return the best lower bound of a rank that is known: its own, or that of a larger rank."""
        rank = min(rank, self.chain.saturation_rank)
        certified = (bound.lower for other, bound in self.known.certified.items() if other >= rank)
        return max(self.curve[rank:].max().item(), *certified, 0.0)

    def floor(self, rank: int) -> Floor:
        """Return the bounds that are known for a rank, with the best known chain.

        Raises:
            UsageError: a rank that is not a positive integer.
        """
        self.chain.patterns(rank)  # checks the rank
        return Floor.between(rank, self.lower(rank), self.upper(rank), self.curve[0].item())

    def floors(self, ranks: Iterable[int]) -> dict[int, Floor | None]:
        """Return the floor of each rank; None for each if the family has no floor."""
        return {rank: self.floor(rank) if self.has_floors else None for rank in ranks}

    def certify(
        self, ranks: Sequence[int], seconds: float, tight: bool = False, stop: Callable[[], bool] = never
    ) -> None:
        """Raise the lower bounds of some ranks, in this order, for about this many seconds; none is ever lowered.

        A bound that runs out of time is valid, and is tried again only with a larger budget.

        Args:
            ranks: positive integers.
            seconds: the budget for all of them.
            tight: go through the ranks a second time, spending several times as long on each.
            stop: asked now and then, and ends the work before its time.
        """
        end = time.monotonic() + seconds

        def expired() -> bool:
            return time.monotonic() >= end or stop()

        for passes in (1, 2) if tight else (1,):
            for rank in self.uncertified(ranks, passes):
                before = self.known.certified.get(rank, Certified())
                if before.seconds >= seconds:
                    continue
                lower = before.lower
                if not expired():
                    lower = max(lower, self._bounds.lower(rank, passes == 2, expired))
                if stop():
                    return
                done = (before.passes, seconds) if expired() else (passes, 0.0)
                self.known.certified[rank] = Certified(lower, *done)

    def uncertified(self, ranks: Iterable[int], passes: int = 1) -> list[int]:
        """Return those ranks whose lower bound could still be raised by a pass of `certify`."""
        clipped = dict.fromkeys(min(rank, self.chain.saturation_rank) for rank in ranks)
        if not self.has_floors:
            return []
        known = self.known.certified
        return [rank for rank in clipped if known.get(rank, Certified()).passes < passes and not self.floor(rank).exact]

    def target_ranks(self, target: float) -> TargetRanks:
        """Return the ranks around a target, by the bounds that are known and the best known chains.

        The optimum falls with the rank, so a rank whose lower bound is above the target excludes all smaller ones, and
        the search for the smallest rank whose best known chain reaches the target needs few chains: the ratio of best
        known chain to curve at the nearest known rank leads to the next one.
        """
        above = [int(rank) for rank in (self.curve > target).nonzero()]
        above += [rank for rank, bound in self.known.certified.items() if bound.lower > target]
        none_below = max(above, default=0) + 1
        reaching = self._smallest_reaching(target, none_below)
        return TargetRanks(target, none_below, reaching, self._loss(reaching), self.floor(reaching).exact)

    def _smallest_reaching(self, target: float, low: int) -> int:
        high = self.chain.saturation_rank
        for rank in sorted(self.known.upper):
            if self._loss(rank) <= target:
                high = min(high, rank)
            elif rank < high:
                low = max(low, rank + 1)
        step = 0
        while low < high:
            step += 1  # every third step halves the range or doubles the rank: poor guesses cannot make the search long
            rank = min((low + high) // 2, 2 * low) if step % 3 == 0 else self._guess(target, low, high)
            low, high = (low, rank) if self._loss(rank) <= target else (rank + 1, high)
        return high

    def _loss(self, rank: int) -> float:
        """Return the loss of the best known chain; of two bounds that are equal up to rounding, the smaller one."""
        floor = self.floor(rank)
        return floor.lower if floor.exact else floor.upper

    def _guess(self, target: float, low: int, high: int) -> int:
        """Return a rank in low … high − 1: where the best known chain is expected to reach the target.

        Between two known ranks the logarithm of the loss is about linear; elsewhere it is as far above the curve as at
        the nearest known rank.
        """
        known = {rank: loss for rank, loss in self.known.upper.items() if min(loss, self.curve[rank].item()) > 0}
        below = max((rank for rank in known if rank < low), default=None)
        above = min((rank for rank in known if rank >= high), default=None)
        if below is not None and above is not None and known[above] < known[below]:
            fraction = math.log(known[below] / target) / math.log(known[below] / known[above])
            expected = below + math.ceil(fraction * (above - below))
        else:
            nearest = above if below is None else below
            ratio = 1.0 if self.curve_is_exact else USUAL_RATIO
            if nearest is not None:
                ratio = known[nearest] / self.curve[nearest].item()
            expected = int((self.curve * ratio <= target).nonzero()[0])
        return min(max(expected, low), high - 1)

    def ranks_around(self, target: float) -> list[int]:
        """Return a quarter, half, once and twice the smallest rank that may reach a target, and the one that does."""
        found = self.target_ranks(target)
        wanted = {found.none_below // 4, found.none_below // 2, found.none_below, 2 * found.none_below, found.reaching}
        return sorted({min(rank, self.chain.saturation_rank) for rank in wanted if rank > 0})

    def family_curves(self) -> list[tuple[Chain, torch.Tensor]]:
        """Return the lower bounds of this family and of low-rank chains, for every rank from 0 on."""
        if not self.has_floors:
            return []
        beside = [] if self.chain.family == "lowrank" else [(self._lowrank_chain, self.lowrank_curve)]
        return [(self.chain, self.curve), *beside]

    def lowrank_beside(self, parameters: int) -> tuple[int, float]:
        """Return the largest rank of a low-rank chain with at most this many parameters, and its least loss."""
        rank = min(parameters // self._lowrank_chain.parameters(1), self._lowrank_chain.saturation_rank)
        return rank, self.lowrank_curve[rank].item()

    @property
    def _lowrank_chain(self) -> Chain:
        return make_chain(self.chain.rows, self.chain.cols, "lowrank")


def floor_rows(plan: RankFloors, predict_zero_loss: float) -> list[dict]:
    """Return the floors of every rank, of the chain and for comparison, as rows of `ks.files.columns.FLOOR`.

    Args:
        plan: of a chain family.
        predict_zero_loss: loss of the zero predictor, in the unit of the file.
    """
    curves = [(chain.family, chain, curve) for chain, curve in plan.family_curves()]
    if plan.isotropic_curve is not None:
        curves.append((ISOTROPIC, plan.chain, plan.isotropic_curve))
    return [
        {
            "chain": name,
            "rank": rank,
            "parameters": chain.parameters(rank),
            "loss_floor": relative * predict_zero_loss,
            "relative_loss": relative,
        }
        for name, chain, curve in curves
        for rank, relative in enumerate(curve.tolist())
        if rank > 0
    ]


def plan_rows(plan: RankFloors, floors: dict[int, Floor | None]) -> list[dict]:
    """Return the cost of every rank and the loss it can reach, as rows of `ks.files.columns.PLANNED_RANKS`.

    Args:
        plan: of a chain family.
        floors: of every rank to list, relative to the zero predictor.
    """
    chain, dense = plan.chain, plan.chain.rows * plan.chain.cols
    rows = []
    for rank, floor in floors.items():
        parameters = chain.parameters(rank)
        marks = ["saturated"] * (rank >= chain.saturation_rank) + ["larger than dense"] * (parameters > dense)
        row: dict[str, Any] = {"rank": rank, "parameters": parameters, "share_of_dense": parameters / dense}
        row |= {"remarks": ", ".join(marks), "patterns": " ".join(map(str, chain.patterns(rank)))}
        if floor is not None:
            row |= {"relative_floor": floor.lower, "relative_floor_upper": None if floor.exact else floor.upper}
        if plan.has_floors and chain.family != "lowrank":
            row["lowrank_rank"], row["lowrank_floor"] = plan.lowrank_beside(parameters)
        if plan.isotropic_curve is not None:
            row["isotropic_floor"] = plan.isotropic_curve[rank:][:1].sum().item()
        rows.append(row)
    return rows
