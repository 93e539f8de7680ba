"""The plan before any training: the floor of every rank of a chain family, and low-rank beside it."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ks.bounds.factorize import low_rank_energies
from ks.bounds.floors import ChainBounds, Floor, Progress, chain_bounds, floor_of, no_floor_reason
from ks.chain.patterns import Chain, make_chain
from ks.moments.second_moment import MomentLike, SecondMoment


@dataclass(frozen=True)
class Plan:
    """Floors of a chain family on one weight, relative to the zero predictor.

    weight: W in units in which predicting 0 costs 1. bounds: of the family, for any rank; None if it has no floor, for
    the given `reason`. isotropic_curve: the floor of every rank 0 … saturation for isotropic inputs, relative to
    predicting 0, for comparison; None if the inputs are isotropic.
    """

    weight: torch.Tensor
    chain: Chain
    moment: SecondMoment
    bounds: ChainBounds | None
    reason: str | None
    isotropic_curve: torch.Tensor | None = None

    @property
    def curve(self) -> torch.Tensor | None:
        """Lower bound for every rank 0 … saturation, float64 on the CPU; None if the family has no floor."""
        return None if self.bounds is None else self.bounds.curve

    def floors(self, ranks: list[int]) -> list[Floor | None]:
        """Return bounds for each rank; None for each if the family has no floor."""
        if self.bounds is None:
            return [None] * len(ranks)
        return [floor_of(self.bounds, self.chain, rank) for rank in ranks]

    def family_curves(self) -> list[tuple[Chain, torch.Tensor]]:
        """Return the lower bounds of this family and of low-rank chains, for every rank from 0 on."""
        if self.curve is None:
            return []
        if self.chain.family == "lowrank":
            return [(self.chain, self.curve)]
        lowrank = make_chain(self.chain.rows, self.chain.cols, "lowrank")
        return [(self.chain, self.curve), (lowrank, self._lowrank_curve)]

    def lowrank_floors(self, parameters: list[int]) -> list[tuple[int, float]]:
        """Return the largest rank of a low-rank chain with at most this many parameters each, and its lower bound."""
        lowrank = make_chain(self.chain.rows, self.chain.cols, "lowrank")
        ranks = [min(count // lowrank.parameters(1), lowrank.saturation_rank) for count in parameters]
        return [(rank, self._lowrank_curve[rank].item()) for rank in ranks]

    @cached_property
    def _lowrank_curve(self) -> torch.Tensor:
        """Lower bounds of low-rank chains; a full decomposition of W, which the file and the figure of floors share."""
        return low_rank_energies(self.weight, self.moment).cpu() / self.chain.rows


def make_plan(
    weight: torch.Tensor,
    chain: Chain,
    moment: MomentLike = None,
    *,
    tight: bool = False,
    progress: Progress | None = None,
    reason: str | None = None,
) -> Plan:
    """Plan a chain family on a weight; floors are computed when they are asked for.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA, scaled so that tr(W C Wᵀ) = m.
        chain: of the same shape.
        moment: C = E[x xᵀ], a tensor of shape (n, n) or a `SecondMoment`; None means I.
        tight: spend longer on lower bounds that are not exact (`ks.bounds.floors.loss_floor`).
        progress: called with a few words before every longer computation.
        reason: why there are no floors, if that is not the chain's doing.
    """
    moment = SecondMoment.of(moment)
    reason = reason or no_floor_reason(chain)
    bounds = None if reason else chain_bounds(weight, chain, moment, tight=tight, progress=progress)
    return Plan(weight, chain, moment, bounds, reason)
