"""Resuming: the files of an earlier run, the settings that must not change, and the checkpoint to resume from.

Partially written files are ignored.
"""

import time
from typing import Any

import torch

from ks.cli.console import note
from ks.cli.flags import TrainingFlags
from ks.errors import UsageError
from ks.files.atomic import finite, read_json_object, save_tensors
from ks.files.layout import RunFiles
from ks.layer import load
from ks.training.best_model import BestModel
from ks.training.optimiser import Optimiser
from ks.training.problem import Problem
from ks.training.schedule import Schedule

# Their effect is compared instead (weight, chain, device, sampling), or they only change reports and files.
NOT_COMPARED = (
    *("weight_path", "weight_key", "transpose", "chain", "blocks", "num_factors", "row_splits", "col_splits"),
    *("device", "sampling", "log_interval", "verbose", "quiet", "save_interval", "resume_interval"),
)


def settings_of(config: TrainingFlags, problem: Problem) -> dict[str, Any]:
    """Return everything that determines the result of a training, except the rank."""
    description = problem.describe()
    settings = {name: value for name, value in config.training_settings().items() if name not in NOT_COMPARED}
    settings |= {name: description[name] for name in ("chain", "device", "sampling")}
    return finite(settings | {"weight": f"sha256 {description['weight']['sha256'][:16]}"})


def changes(before: dict, now: dict) -> str:
    """Return the settings that differ, named one by one; empty if none does."""
    differing = [name for name in now if name not in before or before[name] != now[name]]
    return ", ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in differing)


def is_finished(files: RunFiles, num_epochs: int, curves: list[dict]) -> bool:
    """Return whether a run has ended well and all its files can be read; `curves` are those of its CSV file."""
    if read_json_object(files.training_log).get("status") != "finished":
        return False
    epochs = list(range(1, num_epochs + 1))
    if [row["epoch"] for row in curves] != epochs or read_json_object(files.curves_json).get("epochs") != epochs:
        return False
    try:
        return all(load(path) is not None for path in (files.final, files.best))
    except UsageError:
        return False


def is_resumable(files: RunFiles, settings: dict) -> bool:
    """Return whether the files belong to an earlier run with these settings that did not diverge.

    Raises:
        UsageError: they belong to a run with other settings; each of them is named.
    """
    before = read_json_object(files.config).get("settings")
    if not isinstance(before, dict):
        return False
    if changed := changes(before, settings):
        raise UsageError(
            f"{files.directory} holds a run with other settings ({changed}); leave out --resume to redo it"
        )
    return read_json_object(files.training_log).get("status") != "diverged"


class Checkpoints:
    """The checkpoint to resume from, written after an epoch but not more often than every `interval` seconds.

    Args:
        files: of the run.
        settings: of the run; a checkpoint with other settings is ignored.
        interval: seconds.
        resume: whether to read the checkpoint on disk; `found` is its content, or None.
    """

    def __init__(self, files: RunFiles, settings: dict, interval: float, resume: bool):
        self.files, self.settings, self.interval = files, settings, interval
        self.found: dict | None = self._read() if resume else None
        self.latest: dict | None = None
        self.written = time.monotonic()

    def _read(self) -> dict | None:
        try:
            checkpoint = torch.load(self.files.resume, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception:  # a damaged file can raise nearly anything
            note(f"{self.files.resume} cannot be read: starting anew")
            return None
        return checkpoint if checkpoint.get("settings") == self.settings else None

    def offer(
        self, threads: int, curves: list[dict], optimiser: Optimiser, schedule: Schedule, best: BestModel
    ) -> None:
        """Keep the state at the end of an epoch, and write it if the checkpoint on disk is old enough."""
        self.latest = {
            "settings": self.settings,
            "threads": threads,
            "curves": [dict(row) for row in curves],
            "optimiser": [tensor.detach().to("cpu", copy=True) for tensor in optimiser.state()],
            "schedule": schedule.state(),
            "best": best.state(),
        }
        if time.monotonic() - self.written >= self.interval:
            self.write_latest()

    def write_latest(self) -> None:
        """Write the last epoch that was offered."""
        if self.latest is not None:
            save_tensors(self.latest, self.files.resume)
            self.latest, self.written = None, time.monotonic()

    @torch.no_grad()
    def restore(self, optimiser: Optimiser, schedule: Schedule, best: BestModel) -> list[dict]:
        """Put the found state back and return the curves so far; the result is as if the run had not stopped."""
        assert self.found is not None
        for tensor, value in zip(optimiser.state(), self.found["optimiser"], strict=True):
            tensor.copy_(value)
        schedule.restore(self.found["schedule"])
        best.restore(self.found["best"], self.found["curves"])
        return self.found["curves"]
