"""Experiment trackers, for --log_to: losses, metrics, learning rate and gradient norm of every epoch.

The library of a tracker is imported after the first epoch, and never without --log_to.
"""

import contextlib
import importlib.util
import io
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any, Protocol

from ks.cli.console import note
from ks.cli.flags import TrainerConfig
from ks.errors import UsageError, one_line
from ks.files.atomic import finite, read_json_object, write_json
from ks.files.layout import RunFiles

PROJECT = "kronecker_sparse"
NOT_LOGGED = ("epoch", "rank", "segment", "epoch_seconds")


def check_installed(tracker: str | None) -> None:
    """Raise UsageError if the package of a tracker is not installed; it is not imported."""
    if tracker is None:
        return
    found = importlib.util.find_spec(tracker)
    if found is None or found.origin is None:  # any folder of that name is a package, but without an origin
        raise UsageError(f"--log_to {tracker} needs the package {tracker}; install it: pip install {tracker}")


class Tracker(Protocol):
    """One run of a tracker, open for writing.

    logged: the epochs up to this one need not be logged again.
    """

    logged: int

    def log(self, epoch: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard/PREFIX.

    A resumed training logs all its epochs again, and TensorBoard drops the earlier events (`purge_step`).
    """

    def __init__(self, files: RunFiles, settings: dict[str, Any], restored: int):
        from torch.utils.tensorboard import SummaryWriter

        self.logged = 0
        self._writer = SummaryWriter(str(files.directory / "tensorboard" / files.prefix), purge_step=1)

    def log(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A database in RUN/trackio with one run per prefix, which a resumed training writes anew."""

    def __init__(self, files: RunFiles, settings: dict[str, Any], restored: int):
        os.environ["TRACKIO_DIR"] = str(files.directory / "trackio")  # read when trackio is imported
        import trackio

        self.logged, self._library = 0, trackio
        with contextlib.suppress(ValueError):  # there is no such project yet
            for run in trackio.Api().runs(PROJECT):
                if run.name == files.prefix:
                    run.delete()
        hardware = {"auto_log_cpu": False, "auto_log_gpu": False}
        self._run = trackio.init(PROJECT, name=files.prefix, config=settings, embed=False, **hardware)

    def log(self, epoch: int, values: dict[str, float]) -> None:
        self._run.log(values, step=epoch)

    def close(self) -> None:
        self._library.finish()


class WeightsAndBiases:
    """A run in RUN/wandb, offline unless WANDB_MODE says otherwise.

    A resumed training continues the run, whose id and last epoch are in PREFIX_run.json there. A killed training leaves
    no such file, because wandb then loses the last seconds; the resumed one logs all its epochs to a new run.
    """

    def __init__(self, files: RunFiles, settings: dict[str, Any], restored: int):
        import wandb

        folder = files.directory / "wandb"
        folder.mkdir(exist_ok=True)
        self._state = folder / f"{files.prefix}_run.json"
        before = read_json_object(self._state) if restored else {}
        self._state.unlink(missing_ok=True)
        self.id, self.logged = str(before.get("id", secrets.token_hex(4))), int(before.get("logged", 0))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=files.prefix,
            id=self.id,
            resume="allow",
            config=settings,
            dir=str(files.directory),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off"),
        )

    def log(self, epoch: int, values: dict[str, float]) -> None:
        self._run.log(values, step=epoch)

    def close(self) -> None:
        self._run.finish()
        write_json(self._state, {"id": self.id, "logged": self.logged})


KINDS: dict[str, Callable[[RunFiles, dict[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


class TrackerReport:
    """Logs every epoch once; a tracker that fails is switched off with a warning, and the training goes on.

    Args:
        config: of the training, with a tracker in `log_to`.
        files: of the run.
        settings: of the run, for the tracker's table of runs.
    """

    def __init__(self, config: TrainerConfig, files: RunFiles, settings: dict[str, Any]):
        assert config.log_to is not None
        self.name, self.files, self.settings, self._quiet = config.log_to, files, settings, config.quiet
        self._tracker: Tracker | None = None
        self._failed = False

    def log(self, curves: list[dict]) -> None:
        """Log the epochs of these curves that are not logged yet."""
        self._try(lambda: self._log(curves))

    def close(self) -> None:
        if self._tracker is not None:
            self._try(self._tracker.close)

    def _log(self, curves: list[dict]) -> None:
        if self._tracker is None:
            self._tracker = KINDS[self.name](self.files, self.settings, len(curves) - 1)
            note(f"log_to {self.name}: {self.files.directory / self.name}", self._quiet)
        for row in curves[self._tracker.logged :]:
            values = {name: row[name] for name in row if name not in NOT_LOGGED and finite(row[name]) is not None}
            self._tracker.log(row["epoch"], values)
            self._tracker.logged = row["epoch"]

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        said = io.StringIO() if self._quiet else sys.stderr  # trackio prints on stdout, where results go
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                action()
        except Exception as error:  # a library that talks to servers and databases can raise anything
            self._failed = True
            note(f"WARNING: --log_to {self.name} is switched off ({type(error).__name__}: {one_line(error, 200)})")
