"""What is known before any training: the floor of every rank, saturation, parity with dense, the rank for a target."""

from dataclasses import dataclass

import torch

from ks.factorize import Floor, HierarchicalLoss, floor_curve, loss_floor, no_floor_reason, tail_energies
from ks.patterns import Chain, make_chain


@dataclass(frozen=True)
class Plan:
    """Floors of a chain family on one weight, in the user's loss units.

    curve: lower bound for every rank 0 … saturation, on the CPU in float64; None where the family has no floor, for the
    `reason` given. predict_zero is the loss of predicting 0, σ²‖W‖_F² / m.
    """

    weight: torch.Tensor
    chain: Chain
    predict_zero: float
    curve: torch.Tensor | None
    reason: str | None

    @property
    def _unit(self) -> float:
        """Loss in user units over squared error per output on unit inputs, σ²."""
        return self.predict_zero * self.chain.rows / self.weight.double().square().sum().item()

    def floors(self, ranks: list[int]) -> list[Floor | None]:
        """Bounds for each rank; None for each where there is no floor."""
        if self.curve is None:
            return [None] * len(ranks)
        unit = self._unit
        floors = loss_floor(self.weight, self.chain, ranks, self.curve / unit)
        return [Floor(floor.rank, floor.lower * unit, floor.upper * unit, floor.exact) for floor in floors]

    def smallest_ranks(self, target: float) -> tuple[int, int]:
        """The smallest rank whose lower bound, and the smallest whose upper bound, is at most target · predict_zero.

        Equal for two factors: no smaller rank can reach the target, and this one does. Both bounds are 0 at saturation.

        Args:
            target: relative loss, in (0, 1).
        """
        lower = int((self.curve <= target * self.predict_zero).nonzero()[0].clamp(min=1))
        if self.chain.num_splits == 1:
            return lower, lower
        upper_of, limit = HierarchicalLoss(self.weight, self.chain), target * self.predict_zero / self._unit
        low, high = lower, self.chain.saturation_rank
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if upper_of(middle) <= limit else (middle + 1, high)
        return lower, low

    def ranks_around(self, target: float) -> list[int]:
        """Ranks that show where a target is reached: a quarter, half, once and twice the smallest that can reach it."""
        lower, upper = self.smallest_ranks(target)
        wanted = {lower // 4, lower // 2, lower, 2 * lower, upper}
        return sorted({min(rank, self.chain.saturation_rank) for rank in wanted if rank > 0})

    def curve_rows(self) -> list[dict]:
        """The lower bound for every rank, and that of a low-rank chain, as rows of `ks.results.FLOOR_COLUMNS`."""
        if self.curve is None:
            return []
        lowrank = make_chain(self.chain.rows, self.chain.cols, "lowrank")
        families = {self.chain.family: (self.chain, self.curve)}
        if self.chain.family != "lowrank":
            tail = tail_energies(self.weight).cpu() / self.chain.rows * self._unit
            families["lowrank"] = (lowrank, tail)
        return [
            {
                "chain": name,
                "rank": rank,
                "parameters": chain.parameters(rank),
                "loss_floor": loss,
                "relative_loss": loss / self.predict_zero,
            }
            for name, (chain, curve) in families.items()
            for rank, loss in enumerate(curve.tolist())
            if rank > 0
        ]


def make_plan(weight: torch.Tensor, chain: Chain, predict_zero: float) -> Plan:
    """Compute the floors of a chain family on a weight.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA.
        chain: of the same shape.
        predict_zero: loss of predicting 0 in the user's units.
    """
    reason = no_floor_reason(chain)
    if reason is not None:
        return Plan(weight, chain, predict_zero, None, reason)
    curve = floor_curve(weight, chain)
    return Plan(weight, chain, predict_zero, curve * (predict_zero / curve[0].item()), None)
