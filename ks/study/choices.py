"""What the flags and the plan of a study decide: its ranks, when a training may stop, the commands of a refusal."""

import dataclasses
from pathlib import Path

from ks.bounds.floors import Floor
from ks.bounds.plan import Plan
from ks.bounds.target_rank import ranks_around
from ks.cli.flags import SweepConfig
from ks.cli.parser import command_line
from ks.errors import UsageError
from ks.files.schema import StudyRecord
from ks.report.verdict import converged_loss

DEFAULT_RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def ranks_of(config: SweepConfig, plan: Plan, study: StudyRecord | None) -> tuple[set[int], list[int]]:
    """Return the ranks to train, none above --max_rank, and all ranks of the study, ascending.

    A rerun without --ranks trains those of the study; so does one with more epochs, beside its own.

    Args:
        config: of the sweep.
        plan: of the sweep.
        study: that the results folder holds, or None.
    """
    before = set(study.ranks) if study else set()
    target = config.target_relative_loss
    given = set(config.ranks or ())
    new_target = study is None or study.arguments.get("target_relative_loss") != target
    if not given and target is not None and new_target and plan.curve is not None:
        given = set(ranks_around(plan, target))
    if not given or (study and study.settings.get("num_epochs") != config.num_epochs):
        given |= before
    given = given or set(DEFAULT_RANKS)
    chosen = {rank for rank in given if config.max_rank is None or rank <= config.max_rank}
    if not chosen:
        listed = " ".join(map(str, sorted(given)))
        raise UsageError(f"no rank is left: --max_rank {config.max_rank} excludes all of {listed}")
    return chosen, sorted(chosen | before)


def stop_losses(config: SweepConfig, floors: dict[int, Floor | None]) -> dict[int, float]:
    """Return the relative loss at which --stop_at ends each rank.

    Raises:
        UsageError: --stop_at without what it refers to.
    """
    if config.stop_at == "never":
        return {}
    if config.stop_at == "target":
        if config.target_relative_loss is None:
            raise UsageError("--stop_at target needs --target_relative_loss")
        return dict.fromkeys(floors, config.target_relative_loss)
    known = {rank: floor for rank, floor in floors.items() if floor is not None}
    if not known:
        raise UsageError("--stop_at floor needs a floor, and this chain has none")
    return {rank: converged_loss(floor.upper) for rank, floor in known.items()}


def remedies_of(config: SweepConfig) -> str:
    """Return the two commands that run a study although the results folder holds another one."""
    folder, number = config.output_dir.rstrip("/"), 2
    while Path(f"{folder}_{number}").exists():
        number += 1
    script = "rank_sweep_study.py"
    beside = command_line(script, dataclasses.replace(config, output_dir=f"{folder}_{number}"))
    instead = command_line(script, dataclasses.replace(config, overwrite=True))
    return f"to keep it: {beside}; to replace it: {instead}"
