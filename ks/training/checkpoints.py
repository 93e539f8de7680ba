"""Resuming: the files of an earlier run, the settings that must not change, and the checkpoint to resume from.

The checkpoint stays when a training is finished, so that more epochs continue it. They are a new segment: the optimizer
keeps its state, and a cosine schedule takes the rate that it would have at this epoch of the new total.
Partially written files are ignored.
"""

import dataclasses
import math
import time
from typing import Any

import torch

from ks.cli.console import note
from ks.cli.flags import TrainingFlags
from ks.errors import UsageError
from ks.files.atomic import finite, save_tensors
from ks.files.layout import RunFiles
from ks.files.schema import CheckpointRecord, CurveLists, RunConfig, TrainingLog, convert, read_json_as
from ks.files.status import Status
from ks.files.torch_files import read_torch_file
from ks.layer import load
from ks.training.best_model import BestModel
from ks.training.edits import TOOLKIT, Edits
from ks.training.optimizer import Optimizer
from ks.training.problem import Problem
from ks.training.schedule import Schedule

# Their effect is compared instead (weight, inputs, chain, device, sampling), or they only change reports and files.
NOT_COMPARED = (
    *("weight_path", "weight_key", "transpose", "chain", "blocks", "num_factors", "row_splits", "col_splits"),
    *("inputs", "inputs_key"),
    *("device", "sampling", "optimizer", "log_to", "log_interval", "verbose", "quiet"),
    *("latency_seconds", "save_interval"),
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


def is_finished(
    files: RunFiles, num_epochs: int, curves: list[dict], otherwise: str, stop_below: float | None = None
) -> bool:
    """Return whether a run has ended well, needs no more epochs, and all its files are valid.

    Args:
        files: of the run.
        num_epochs: that it is to train.
        curves: of its CSV file.
        otherwise: what follows if it seems to have ended well, but a file is not valid; printed with the reason.
        stop_below: relative population loss that ends it earlier.
    """
    try:
        if not files.training_log.exists():
            return False
        log = read_json_as(files.training_log, TrainingLog)
        if log.status != Status.FINISHED:
            return False
        epochs = log.epochs or num_epochs
        _check_curves(files, epochs, curves)
        stopped = None not in (stop_below, log.relative_loss) and log.relative_loss <= stop_below
        return (stopped or epochs >= num_epochs) and all(load(path) is not None for path in (files.final, files.best))
    except UsageError as error:
        note(f"{error}; {otherwise}")
        return False


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


class Checkpoints:
    """The checkpoint to resume from, written at the end of an epoch as often as this takes at most 2% of the time.

    Args:
        files: of the run.
        settings: of the run; a checkpoint with other settings is ignored.
        resume: whether to read the checkpoint on disk; `found` is its content, or None.

    `segment` is the number of the segment that is trained.
    """

    segment = 1

    def __init__(self, files: RunFiles, settings: dict, resume: bool):
        self.files, self.settings = files, settings
        self.found: CheckpointRecord | None = self._read() if resume else None
        self.latest: dict | None = None
        self.next_write = 0.0

    def _read(self) -> CheckpointRecord | None:
        if not self.files.resume.exists():
            return None
        try:
            content = read_torch_file(self.files.resume, "a checkpoint")
            if isinstance(content, dict) and "optimiser" in content:  # of version 0.1.0
                content["optimizer"] = content.pop("optimiser")
            checkpoint = convert(content, CheckpointRecord, f"checkpoint {self.files.resume}")
        except UsageError as error:
            note(f"{error}; training starts anew")
            return None
        return None if changes(settings_in(checkpoint.settings, None), self.settings) else checkpoint

    def offer(
        self, threads: int, curves: list[dict], optimizer: Optimizer, schedule: Schedule, best: BestModel
    ) -> None:
        """Keep the state at the end of an epoch on its device, and write it if that is due."""
        self.latest = {
            "settings": self.settings,
            "threads": threads,
            "curves": [dict(row) for row in curves],
            "optimizer": [tensor.detach().clone() for tensor in optimizer.state()],
            "schedule": schedule.state(),
            "best": best.state(),
        }
        if time.monotonic() >= self.next_write:
            self.write_latest()

    def write_latest(self) -> None:
        """Write the last epoch that was offered."""
        if self.latest is not None:
            started = time.monotonic()
            on_host = {"optimizer": [tensor.cpu() for tensor in self.latest["optimizer"]]}
            save_tensors(self.latest | on_host, self.files.resume)
            self.latest, ended = None, time.monotonic()
            self.next_write = ended + 50 * (ended - started)

    @torch.no_grad()
    def restore(self, optimizer: Optimizer, schedule: Schedule, best: BestModel) -> list[dict]:
        """Put the found state back and return the curves so far; the result is as if the run had not stopped."""
        found = self.found
        if found is None:
            return []
        if not self._fits(found, optimizer, best):
            note(
                f"checkpoint {self.files.resume} is not valid: its tensors are those of another training; starting anew"
            )
            return []
        for tensor, value in zip(optimizer.state(), found.optimizer, strict=True):
            tensor.copy_(value)
        schedule.restore(found.schedule)
        curves = [dict(row) for row in found.curves]
        longer = found.settings["num_epochs"] != self.settings["num_epochs"]
        self.segment = curves[-1].get("segment", 1) + longer
        best.restore(found.best, curves)
        return curves

    def _fits(self, found: CheckpointRecord, optimizer: Optimizer, best: BestModel) -> bool:
        """Return whether a checkpoint has the shapes, epochs and rank of this training."""
        pairs = ((found.optimizer, optimizer.state()), (found.best.factors, best.chain.factors))
        shapes = all([value.shape for value in kept] == [tensor.shape for tensor in now] for kept, now in pairs)
        rows = [(row["epoch"], row["rank"]) for row in found.curves]
        whole = rows == [(epoch, self.files.rank) for epoch in range(1, len(rows) + 1)]
        return shapes and whole and found.best.epoch <= len(found.curves)
