"""The target of one training: before it, the rank that can reach the target; after it, whether this rank has."""

import math
from dataclasses import dataclass

from ks.bounds.floors import Floor
from ks.bounds.plan import make_plan
from ks.bounds.plan_notes import chain_notes, plan_notes
from ks.bounds.shares import shares
from ks.bounds.target_rank import smallest_ranks
from ks.cli.console import note
from ks.cli.flags import TrainerConfig
from ks.training.problem import Problem


@dataclass(frozen=True)
class Target:
    """The target of a training, and the floor of its rank.

    Args:
        share: loss relative to predicting 0; None if there is no target.
        rank: of the training.
        predict_zero_loss: loss of predicting 0, in the unit of the curves.
        floor: of that rank, relative to predicting 0; None without a target, or if the chain has none.
        reaching: the smallest rank whose best known chain reaches the target; None without a floor.
        notes: saturation, parity and the rank for the target, one sentence each.
    """

    share: float | None
    rank: int
    predict_zero_loss: float
    floor: Floor | None
    reaching: int | None
    notes: tuple[str, ...]

    def outcome(self, last: dict) -> list[str]:
        """Return whether the target was reached, in one sentence; nothing without a target.

        Args:
            last: row of the last epoch in the curves.
        """
        if self.share is None:
            return []
        relative_loss = last.get("population_loss", math.nan) / self.predict_zero_loss
        if math.isnan(relative_loss):
            return ["The criterion is not the mean squared error, so the share of the output energy lost is not known."]
        floors = [] if self.floor is None else [self.floor.lower, self.floor.upper][: 1 if self.floor.exact else 2]
        loss, limit, *least = shares(relative_loss, self.share, *floors)
        floor = f", its floor is {' to '.join(least)}" if least else ""
        if relative_loss <= self.share:
            return [f"Rank {self.rank} loses at most {limit} of the output energy: it loses {loss}{floor}."]
        remedy = "more --num_epochs or a larger --rank"
        if self.floor is not None and self.floor.lower > self.share:
            remedy = f"--rank {self.reaching}"
        return [f"{limit} of the output energy is not reached: rank {self.rank} ends at {loss}{floor}. Use {remedy}."]


def target_of(config: TrainerConfig, problem: Problem) -> Target:
    """Return the target that the flags name; floors are computed only if there is one."""
    share, rank, chain, zero = config.target_relative_loss, config.rank, problem.chain, problem.predict_zero_loss
    if share is None:
        return Target(None, rank, zero, None, None, tuple(chain_notes(chain)))
    if problem.rows * problem.cols > 2**22 or config.inputs:
        note(f"computing the floors of {problem.rows} × {problem.cols}", config.quiet)
    plan = make_plan(problem.internal_weight(), chain, problem.inputs)
    (floor,) = plan.floors([rank])
    reaching = smallest_ranks(plan, share)[1] if plan.bounds is not None else None
    return Target(share, rank, zero, floor, reaching, tuple(plan_notes(plan, share)))
