"""The plan before any training: the floor of every rank of a chain family, and low-rank beside it."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ks.bounds.factorize import Report, do_not_report, tail_energies
from ks.bounds.floors import Floor, floor_curve, loss_floor, no_floor_reason
from ks.bounds.moments import UNIT_INPUTS, IsotropicInputs
from ks.patterns import Chain, make_chain


@dataclass(frozen=True)
class Plan:
    """Floors of a chain family on one weight, relative to the zero predictor.

    weight: W in units in which predicting 0 costs 1. curve: lower bound for every rank 0 … saturation, float64 on the
    CPU; None if the family has no floor, for the given `reason`.
    """

    weight: torch.Tensor
    chain: Chain
    inputs: IsotropicInputs
    curve: torch.Tensor | None
    reason: str | None

    def floors(self, ranks: list[int]) -> list[Floor | None]:
        """Return bounds for each rank; None for each if the family has no floor."""
        if self.curve is None:
            return [None] * len(ranks)
        return [*loss_floor(self.weight, self.chain, ranks, self.curve, self.inputs)]

    def family_curves(self) -> list[tuple[Chain, torch.Tensor]]:
        """Return the lower bounds of this family and of low-rank chains, for every rank from 0 on."""
        if self.curve is None:
            return []
        if self.chain.family == "lowrank":
            return [(self.chain, self.curve)]
        lowrank = make_chain(self.chain.rows, self.chain.cols, "lowrank")
        return [(self.chain, self.curve), (lowrank, self._lowrank_curve)]

    @cached_property
    def _lowrank_curve(self) -> torch.Tensor:
        """Lower bounds of low-rank chains; a full decomposition of W, which the file and the figure of floors share."""
        return tail_energies(self.inputs.times_root(self.weight)).cpu() / self.chain.rows


def make_plan(
    weight: torch.Tensor, chain: Chain, inputs: IsotropicInputs = UNIT_INPUTS, report: Report = do_not_report
) -> Plan:
    """Compute the floors of a chain family on a weight.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA, scaled so that tr(W C Wᵀ) = m.
        chain: of the same shape.
        inputs: the second moment C of x.
        report: told the share of the work that is done.
    """
    reason = no_floor_reason(chain)
    curve = None if reason else floor_curve(weight, chain, inputs, report)
    return Plan(weight, chain, inputs, curve, reason)
