"""The record of a training: its config and log on disk, and the exit code and message for every way it can end."""

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

import msgspec
import torch

from ks import signals
from ks.cli import console
from ks.cli.flags import TrainerConfig
from ks.errors import one_line
from ks.files.atomic import read_json_object, write_json
from ks.files.layout import RunFiles
from ks.files.provenance import now, peak_memory, provenance
from ks.files.schema import Latency
from ks.files.status import Status
from ks.training.checks import Diverged
from ks.training.problem import Problem


class RunRecord:
    """A context in which the training runs; `exit_code` and `message` (None if all is well) are set when it ends.

    A diverged, interrupted or out-of-memory training and a failed write are over with that; any other exception is
    recorded and raised again.

    Args:
        config: of the training.
        problem: that it solves.
        settings: that a resumed run must share.
        files: of the run.
        resumed: whether the time of an earlier run counts.
        owned: the files in the folder that this run may overwrite.
    """

    def __init__(
        self,
        config: TrainerConfig,
        problem: Problem,
        settings: dict,
        files: RunFiles,
        resumed: bool,
        owned: Iterable[Path],
    ):
        self.config, self.problem, self.files = config, problem, files
        self.config_file: dict = {
            "settings": settings,
            "arguments": vars(config),
            "problem": problem.describe(),
            "provenance": provenance(),
            "files": sorted(path.name for path in {*files.results(), *owned}),
        }
        self.log: dict = {"status": Status.RUNNING, "started": now()}
        self.exit_code = console.EXIT_FAILED
        self.message: str | None = None
        before = read_json_object(files.training_log) if resumed else {}
        self._seconds_before = before.get("train_seconds", 0.0)
        if before.get("latency"):
            self.log["latency"] = before["latency"]

    def own(self, path: Path) -> None:
        """Record a file before it is written."""
        if path.name not in self.config_file["files"]:
            self.config_file["files"].append(path.name)
            write_json(self.files.config, self.config_file)

    def decide(self, what: str, choice: str, reason: str, warning: str | None = None) -> None:
        """Record and report a choice of the program; a warning is shown even with --quiet."""
        self.config_file[what] = {"name": choice, "reason": reason} | ({"warning": warning} if warning else {})
        write_json(self.files.config, self.config_file)
        console.note(f"{what} {choice}: {reason}", self.config.quiet)
        if warning:
            console.note(f"WARNING: {warning}")

    def resume(self, epoch: int) -> None:
        """Record and report the epoch after which the training resumes."""
        self.log["resumed_after"] = epoch
        write_json(self.files.training_log, self.log)
        console.note(f"resumed after epoch {epoch}", self.config.quiet)

    def finish(self, epochs: int, loss: float | None) -> None:
        """Record how many epochs a training had at its end, and its population loss if that is known."""
        self.log |= {"epochs": epochs}
        if loss is not None:
            self.log["relative_loss"] = loss / self.problem.predict_zero_loss

    def warn(self, what: str, warning: str) -> None:
        """Record a warning about a choice of the program, and show it even with --quiet."""
        self.config_file.setdefault(what, {"name": self.problem.describe()[what], "reason": ""})["warning"] = warning
        write_json(self.files.config, self.config_file)
        console.note(f"WARNING: {warning}")

    def keep_latency(self, measure: Callable[[], Latency]) -> None:
        """Record what `measure` returns, unless an earlier run has measured; its time does not count as training."""
        if "latency" not in self.log:
            began = time.perf_counter()
            self.log["latency"] = msgspec.structs.asdict(measure())
            self._started += time.perf_counter() - began

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def begin(self) -> None:
        """Write config and log, so that a killed training leaves them."""
        write_json(self.files.config, self.config_file)
        write_json(self.files.training_log, self.log)

    def __exit__(self, kind, error: BaseException | None, traceback) -> bool:
        self.message = self._classify(error)
        if self.message is not None:
            self.log["error"] = one_line(self.message)
        seconds = self._seconds_before + time.perf_counter() - self._started
        self.log |= {"ended": now(), "train_seconds": seconds}
        self.config_file |= {"ended": self.log["ended"], **peak_memory(self.problem.device)}
        with contextlib.suppress(OSError):  # a full disk has been reported
            write_json(self.files.config, self.config_file)
            write_json(self.files.training_log, self.log)
        return self.log["status"] != Status.FAILED or isinstance(error, OSError)

    def _classify(self, error: BaseException | None) -> str | None:
        """Set status and exit code for how the training ended; return the message, None if it ended well."""
        if error is None:
            self.log["status"], self.exit_code = "finished", console.EXIT_OK
            return None
        if isinstance(error, Diverged):
            self.log["status"] = Status.DIVERGED
            return str(error)
        if signals.came() or isinstance(error, KeyboardInterrupt):
            self.log["status"], self.exit_code = Status.INTERRUPTED, console.EXIT_INTERRUPTED
            return "interrupted; the finished epochs are kept, and --resume continues after them"
        if _is_out_of_memory(error):
            self.log["status"] = Status.OUT_OF_MEMORY
            smaller = max(1, self.config.batch_size // 2)
            advice = f"try --batch_size {smaller}, fewer --num_samples or --dtype bfloat16"
            return f"out of memory on {self.problem.device}; {advice}"
        self.log["status"] = Status.FAILED
        if isinstance(error, OSError):
            place = error.filename or self.files.directory
            return f"{error.strerror}: {place}; fix the cause, then rerun the same command with --resume"
        return f"{type(error).__name__}: {error}"


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; the CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
