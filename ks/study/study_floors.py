"""The floors of a study of one weight: kept in its folder, certified within a time, and as facts for the answer."""

import time
from collections.abc import Mapping

from ks import signals
from ks.bounds.floors_file import FloorsFile
from ks.bounds.rank_floors import Certified, RankFloors
from ks.chain.patterns import Chain
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.errors import one_line
from ks.moments.metric import LossMetric
from ks.report.answer import Facts, named_row
from ks.training.problem import Problem

DEFAULT_SECONDS = 30.0  # of --tight_bounds, for the lower bounds of the ranks that the answer names
LARGE_WEIGHT = 2**22  # entries from which on the floors for isotropic inputs take seconds


def plan_floors(config: SweepConfig, problem: Problem) -> RankFloors:
    """Return the floors of the study's chain family, with all bounds that `keep_floors` has left in its folder."""
    ours = problem.edits.criterion_is_ours
    known = FloorsFile(config.files().bounds).find_bounds(*_identity(problem)) if ours else None
    if known is not None and known.curve is None and (is_large(problem) or config.inputs):
        key = f"{one_line(problem.weight.key)}, " if problem.weight.key else ""
        weight = f"{key}{problem.rows} × {problem.cols}, {problem.chain.family}"
        console.note(f"computing the floors of {weight}", config.quiet)
    beside = config.inputs and problem.loss_metric is LossMetric.OUTPUT_ENERGY  # isotropic inputs cost no model a loss
    return RankFloors(
        problem.internal_weight(),
        problem.chain,
        problem.metric,
        isotropic_weight=problem.isotropic_weight if beside else None,
        known=known,
        progress=SlowWork(config.quiet),
        reason=None if ours else "floors hold for mean_squared_error alone",
    )


def is_large(problem: Problem) -> bool:
    """Return whether the floors of a weight for isotropic inputs take seconds."""
    return problem.rows * problem.cols > LARGE_WEIGHT


def keep_floors(config: SweepConfig, problem: Problem, floors: RankFloors) -> None:
    """Write all bounds that are known into the folder of the study, so that no rerun computes them again."""
    if floors.has_floors:
        file = FloorsFile(config.files().bounds)
        file.add_bounds(*_identity(problem), floors.known)
        file.save()


def _identity(problem: Problem) -> tuple[str, str | None, Chain]:
    """Return the hashes of weight and inputs, and the chain; the scale of isotropic inputs changes no relative loss."""
    inputs = problem.layer_inputs.description
    names = ("sha256", "count", "held_out_count", "centred", "gradients_sha256", "damping")
    measured = " ".join(str(inputs[name]) for name in names if name in inputs) if "sha256" in inputs else None
    return problem.weight.sha256(), measured, problem.chain


def ranks_of_answer(rows: list[dict], floors: RankFloors, target: float | None) -> list[int]:
    """Return the ranks whose lower bounds the answer depends on, most important first.

    They are the rank that the answer names, whose verdict is about the distance to its floor, and the rank below the
    smallest one that is known to reach the target: if its bound is above the target, no smaller rank can reach it.
    """
    named = named_row(rows, target)
    if named is None or not floors.has_floors:
        return []
    ranks = [named["rank"]]
    if target is not None:
        found = floors.target_ranks(target)
        reaching = min(found.reaching, named["rank"]) if named["relative_loss"] <= target else found.reaching
        if found.none_below < reaching:
            ranks.append(reaching - 1)
    return ranks


def certify(
    floors: RankFloors, first: list[int], ranks: list[int], seconds: float, found: Mapping[int, Certified] = {}
) -> None:
    """Raise the lower bounds of the first ranks, those of the answer; with more than 30 seconds, then those of all.

    Bounds that were `found` before are taken, but none of another rank: the result does not depend on them.
    """
    more = seconds > DEFAULT_SECONDS
    wanted = [*first, *ranks] if more else first
    floors.known.certified |= {rank: found[rank] for rank in floors.uncertified(wanted, 1 + more) if rank in found}
    floors.certify(wanted, seconds, tight=more, stop=signals.came)


def find_facts(rows: list[dict], floors: RankFloors, target: float | None, seconds: float) -> Facts:
    """Return the facts of a study from the rows of its summary and the known bounds; compute no lower bound."""
    named = named_row(rows, target)
    if named is None or not floors.has_floors:
        return Facts()
    lowrank = {}
    if floors.chain.family != "lowrank":
        lowrank = {row["rank"]: floors.lowrank_beside(floors.chain.parameters(row["rank"])) for row in rows}
    # After an interrupt, nothing was certified, whatever time it would have taken.
    uncertified = () if signals.came() else tuple(floors.uncertified(ranks_of_answer(rows, floors, target)))
    if target is None:
        return Facts(lowrank, uncertified=uncertified, seconds=seconds)
    found, remedy = floors.target_ranks(target), None
    if named["relative_loss"] > target and named["relative_floor_upper"] is not None:
        # The best known chain of the remedy leaves room for an excess as large as that of the named rank.
        wanted = target - max(named["relative_loss"] - named["relative_floor_upper"], 0.0)
        rank = floors.target_ranks(wanted).reaching if wanted > 0 else floors.chain.saturation_rank
        larger_than_dense = floors.chain.parameters(rank) > floors.chain.rows * floors.chain.cols
        remedy = (rank, floors.upper(rank), larger_than_dense)
    return Facts(lowrank, found, remedy, uncertified, seconds)


class SlowWork:
    """Print the step that a long computation is at to stderr, at most every two seconds; nothing if quiet."""

    SECONDS = 2.0

    def __init__(self, quiet: bool):
        self.quiet, self.last = quiet, time.monotonic()

    def __call__(self, step: str) -> None:
        """Show a step of the computation, in a few words."""
        if time.monotonic() - self.last >= self.SECONDS:
            self.last = time.monotonic()
            console.note(step, self.quiet)
