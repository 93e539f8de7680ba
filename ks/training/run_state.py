"""The state of a run, read from its files: whether it has ended well, how else it stands, whether it can go on."""

from dataclasses import dataclass

from ks.cli.console import note
from ks.errors import UsageError
from ks.files.atomic import finite
from ks.files.curves import curves_if_any
from ks.files.layout import RunFiles
from ks.files.schema import CurveLists, RunConfig, TrainingLog, read_json_as
from ks.files.status import OK, Ending, Status
from ks.layer import load
from ks.training.settings import changes, settings_in


@dataclass(frozen=True)
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
    return RunState(Ending(status), curves, log)


def _is_complete(
    files: RunFiles, num_epochs: int, stop_below: float | None, curves: list[dict], log: TrainingLog
) -> bool:
    """Return whether a run that ended well needs no more epochs.

    Raises:
        UsageError: one of its files is not valid.
    """
    epochs = log.epochs or num_epochs
    _check_curves(files, epochs, curves)
    stopped = stop_below is not None and log.relative_loss is not None and log.relative_loss <= stop_below
    return (stopped or epochs >= num_epochs) and all(load(path) is not None for path in (files.final, files.best))


def _check_curves(files: RunFiles, num_epochs: int, curves: list[dict]) -> None:
    """Raise UsageError unless the CSV file of a run holds all its epochs, and its JSON file the same losses."""
    epochs = list(range(1, num_epochs + 1))
    if [(row["epoch"], row["rank"]) for row in curves] != [(epoch, files.rank) for epoch in epochs]:
        raise UsageError(f"{files.curves_csv} does not hold the epochs 1 to {num_epochs} of rank {files.rank}")
    lists = read_json_as(files.curves_json, CurveLists)
    stored = [lists.epochs, lists.train_losses, lists.val_losses, lists.population_losses]
    names = ("train_loss", "val_loss", "population_loss")
    if stored != [epochs, *([finite(row.get(name)) for row in curves] for name in names)]:
        raise UsageError(f"{files.curves_csv} and {files.curves_json} differ")


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
