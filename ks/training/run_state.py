"""The settings that identify a run or a study, and the state of a run by its files: finished, resumable, or neither."""

import dataclasses
from typing import Any

from ks.cli.console import note
from ks.cli.flags import TrainingFlags
from ks.errors import UsageError
from ks.files.atomic import finite
from ks.files.curves import curves_if_any
from ks.files.layout import RunFiles
from ks.files.schema import CurveLists, RunConfig, TrainingLog, read_json_as
from ks.files.status import OK, Ending, Status
from ks.layer import load
from ks.moments.metric import LossMetric
from ks.training.criterion_identity import TOOLKIT, Edits
from ks.training.problem import Problem

# Their effect is compared instead (weight, inputs, chain, device, sampling), or they only change reports and files.
NOT_COMPARED = (
    *("weight_path", "weight_key", "transpose", "chain", "blocks", "num_factors", "row_splits", "col_splits"),
    *("inputs", "inputs_key", "loss_metric"),
    *("device", "sampling", "optimizer", "log_to", "log_interval", "verbose", "quiet"),
    *("latency_seconds", "save_interval"),
)


def settings_of(config: TrainingFlags, problem: Problem) -> dict[str, Any]:
    """Return everything that determines the result of a run, except the rank."""
    description = problem.describe()
    settings = {name: value for name, value in config.training_settings().items() if name not in NOT_COMPARED}
    settings |= {name: description[name] for name in ("chain", "device", "sampling", "optimizer")}
    settings |= {"criterion": problem.edits.criterion, "metrics": problem.edits.metrics}
    settings["loss_metric"] = problem.loss_metric.value
    if "gradients_sha256" in description["inputs"]:
        inputs = description["inputs"]
        settings |= {"gradients": f"sha256 {inputs['gradients_sha256'][:16]}", "damping": inputs["damping"]}
    for name in ("weight", "inputs"):  # isotropic inputs have no hash
        sha256 = description[name].get("sha256")
        settings[name] = f"sha256 {sha256[:16]}" if sha256 else description[name]["kind"]
    return finite(settings)


def changes(before: dict, now: dict) -> str:
    """Return the settings that differ, named one by one; empty if none does, or if there are only more epochs."""
    differing = [name for name in now if name not in before or before[name] != now[name]]
    epochs = before.get("num_epochs")
    if "num_epochs" in differing and isinstance(epochs, int) and epochs < now["num_epochs"]:
        differing.remove("num_epochs")
    return ", ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in differing)


def settings_in(settings: dict, loss: str | None) -> dict:
    """Return recorded settings; version 0.1.0 named no criterion, but recorded a label of its loss, and there was no
    other metric than output energy.

    Args:
        settings: of a run or a study.
        loss: the label, if there is one.
    """
    ours = loss in (None, "mean squared error per output")
    metric = {"loss_metric": LossMetric.OUTPUT_ENERGY.value}
    return dataclasses.asdict(TOOLKIT if ours else Edits(str(loss))) | metric | settings


@dataclasses.dataclass(frozen=True)
class RunState:
    """The files of a run, read once; `ending` is OK only if the run needs no more epochs and its files are valid."""

    ending: Ending
    curves: list[dict]
    log: TrainingLog


def read_state(files: RunFiles, num_epochs: int, stop_below: float | None, otherwise: str) -> RunState:
    """Return the state of a run as its files show it while no process works on them.

    Args:
        files: of the run.
        num_epochs: that it is to train.
        stop_below: relative population loss that ends it earlier, or None.
        otherwise: what follows if a file is not valid; printed with the reason.
    """
    curves, log = curves_if_any(files.curves_csv), TrainingLog("")
    try:
        if files.training_log.exists():
            log = read_json_as(files.training_log, TrainingLog)
            if Status.of(log.status) is Status.OK and _is_complete(files, num_epochs, stop_below, curves, log):
                return RunState(OK, curves, log)
    except UsageError as error:
        note(f"{error}; {otherwise}")
    status = Status.of(log.status)
    if status not in (Status.DIVERGED, Status.OUT_OF_MEMORY, Status.FAILED):
        status = Status.INTERRUPTED if log.status or curves else Status.NOT_STARTED
    reached = f"after epoch {len(curves)}" if status is Status.INTERRUPTED and curves else ""
    return RunState(Ending(status, reached), curves, log)


def _is_complete(
    files: RunFiles, num_epochs: int, stop_below: float | None, curves: list[dict], log: TrainingLog
) -> bool:
    """Return whether a run that ended well needs no more epochs.

    Raises:
        UsageError: a model cannot be read; the CSV file lacks an epoch, or the JSON file has other losses.
    """
    trained = log.epochs or num_epochs
    epochs = list(range(1, trained + 1))
    if [(row["epoch"], row["rank"]) for row in curves] != [(epoch, files.rank) for epoch in epochs]:
        raise UsageError(f"{files.curves_csv} does not hold the epochs 1 to {trained} of rank {files.rank}")
    lists = read_json_as(files.curves_json, CurveLists)
    stored = [lists.epochs, lists.train_losses, lists.val_losses, lists.population_losses]
    names = ("train_loss", "val_loss", "population_loss")
    if stored != [epochs, *([finite(row.get(name)) for row in curves] for name in names)]:
        raise UsageError(f"{files.curves_csv} and {files.curves_json} differ")
    stopped = stop_below is not None and log.relative_loss is not None and log.relative_loss <= stop_below
    return (stopped or trained >= num_epochs) and all(load(path) is not None for path in (files.final, files.best))


def is_resumable(files: RunFiles, settings: dict) -> bool:
    """Return whether the files belong to an earlier run with these settings that did not diverge.

    Raises:
        UsageError: they belong to a run with other settings; each of them is named.
    """
    try:
        config = read_json_as(files.config, RunConfig) if files.config.exists() else None
        log = read_json_as(files.training_log, TrainingLog) if files.training_log.exists() else None
    except UsageError as error:
        note(f"{error}; training starts anew")
        return False
    if config is None:
        return False
    if changed := changes(settings_in(config.settings, config.loss and config.loss.name), settings):
        raise UsageError(
            f"{files.directory} holds a run with other settings ({changed}); leave out --resume to redo it"
        )
    return log is None or log.status != Status.DIVERGED
