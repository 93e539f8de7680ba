"""Experiment trackers, for --log_to: losses, metrics, learning rate and gradient norm of every epoch.

A tracker and its library are opened after the first epoch. A resumed run logs all its epochs again: TensorBoard and
trackio replace what they had of the run, wandb begins another one.
"""

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from ks.cli.console import note
from ks.cli.flags import TrainerConfig
from ks.errors import UsageError, one_line
from ks.files.atomic import finite
from ks.files.layout import RunFiles

PROJECT = "kronecker_sparse"
NOT_LOGGED = ("epoch", "rank", "segment", "epoch_seconds")

# A tracker opens a run, and returns how to log the values of an epoch and how to close the run.
Opened = tuple[Callable[[int, dict[str, float]], Any], Callable[[], Any]]


def check_installed(tracker: str | None) -> None:
    """Raise UsageError if the package of a tracker is not installed; it is not imported."""
    found = tracker and importlib.util.find_spec(tracker)
    if tracker and not (found and found.origin):  # any folder of that name is a package, but without an origin
        raise UsageError(f"--log_to {tracker} needs the package {tracker}; install it: pip install {tracker}")


def tensorboard(files: RunFiles, settings: dict[str, Any]) -> Opened:
    """Open event files in RUN/tensorboard/PREFIX."""
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard then drops the events of earlier files.
    writer = SummaryWriter(str(files.directory / "tensorboard" / files.prefix), purge_step=1)

    def log(epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return log, writer.close


def trackio(files: RunFiles, settings: dict[str, Any]) -> Opened:
    """Open a run PREFIX in the database in RUN/trackio."""
    os.environ["TRACKIO_DIR"] = str(files.directory / "trackio")  # read when trackio is imported
    import trackio

    with contextlib.suppress(ValueError):  # there is no such project yet
        for run in trackio.Api().runs(PROJECT):
            if run.name == files.prefix:
                run.delete()
    hardware = {"auto_log_cpu": False, "auto_log_gpu": False}
    run = trackio.init(PROJECT, name=files.prefix, config=settings, embed=False, **hardware)
    return lambda epoch, values: run.log(values, step=epoch), trackio.finish


def wandb(files: RunFiles, settings: dict[str, Any]) -> Opened:
    """Open a run of Weights & Biases in RUN/wandb, offline unless WANDB_MODE says otherwise."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=files.prefix,
        config=settings,
        dir=str(files.directory),
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings=wandb.Settings(console="off"),
    )
    return lambda epoch, values: run.log(values, step=epoch), run.finish


OPENERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


class Tracker:
    """Logs every epoch once to the tracker in `config.log_to`, if any.

    A tracker that fails is switched off with a warning, and the run goes on. `settings` are shown in the tracker.
    """

    def __init__(self, config: TrainerConfig, files: RunFiles, settings: dict[str, Any]):
        self.name, self.files, self.settings, self._quiet = config.log_to or "", files, settings, config.quiet
        self._on, self._logged = bool(self.name), 0
        self._opened: Opened | None = None

    def log(self, curves: list[dict]) -> None:
        """Log the epochs of these curves that are not logged yet."""
        self._try(lambda: self._log(curves))

    def close(self) -> None:
        if self._opened is not None:
            self._try(self._opened[1])

    def _log(self, curves: list[dict]) -> None:
        if self._opened is None:
            self._opened = OPENERS[self.name](self.files, self.settings)
            note(f"log_to {self.name}: {self.files.directory / self.name}", self._quiet)
        for row in curves[self._logged :]:
            values = {name: row[name] for name in row if name not in NOT_LOGGED and finite(row[name]) is not None}
            self._opened[0](row["epoch"], values)
        self._logged = len(curves)

    def _try(self, action: Callable[[], Any]) -> None:
        if not self._on:
            return
        output = io.StringIO() if self._quiet else sys.stderr  # trackio prints on stdout, where results go
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                action()
        except Exception as error:  # a library that talks to servers and databases can raise anything
            self._on = False
            note(f"WARNING: --log_to {self.name} is switched off ({type(error).__name__}: {one_line(error, 200)})")
