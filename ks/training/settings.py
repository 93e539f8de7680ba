"""The settings that identify a run and a study: everything that determines the result, compared before results mix."""

import dataclasses
import math
from typing import Any

from ks.cli.flags import TrainingFlags
from ks.files.atomic import finite
from ks.training.edits import TOOLKIT, Edits
from ks.training.problem import Problem

# Their effect is compared instead (weight, inputs, chain, device, sampling), or they only change reports and files.
NOT_COMPARED = (
    *("weight_path", "weight_key", "transpose", "chain", "blocks", "num_factors", "row_splits", "col_splits"),
    *("inputs", "inputs_key"),
    *("device", "sampling", "optimizer", "log_to", "log_interval", "verbose", "quiet"),
    *("latency_seconds", "save_interval", "resume_interval"),
)


def settings_of(config: TrainingFlags, problem: Problem) -> dict[str, Any]:
    """Return everything that determines the result of a training, except the rank."""
    description = problem.describe()
    settings = {name: value for name, value in config.training_settings().items() if name not in NOT_COMPARED}
    settings |= {name: description[name] for name in ("chain", "device", "sampling", "optimizer")}
    settings |= {"criterion": problem.edits.criterion, "metrics": problem.edits.metrics}
    hashes = {name: _identity(description[name]) for name in ("weight", "inputs")}
    return finite(settings | hashes)


def _identity(description: dict[str, Any]) -> str:
    """Return the hash of a weight or of measured inputs, or the kind of inputs that have none."""
    return f"sha256 {description['sha256'][:16]}" if "sha256" in description else description["kind"]


def changes(before: dict, now: dict) -> str:
    """Return the settings that differ, named one by one; empty if none does, or if there are only more epochs."""
    differing = [name for name in now if name not in before or before[name] != now[name]]
    if "num_epochs" in differing and _number(before.get("num_epochs")) < _number(now["num_epochs"]):
        differing.remove("num_epochs")
    return ", ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in differing)


def settings_in(settings: dict, loss: str | None) -> dict:
    """Return recorded settings; version 0.1.0 named no criterion, but recorded a label of its loss.

    Args:
        settings: of a run or a study.
        loss: the label, if there is one.
    """
    ours = loss in (None, "mean squared error per output")
    return dataclasses.asdict(TOOLKIT if ours else Edits(str(loss))) | settings


def _number(value: object) -> float:
    return value if isinstance(value, int) else math.inf
