"""The ways in which a run can end: status in its log, exit code of its process, message for its user."""

from typing import NamedTuple

import torch

from ks import signals
from ks.cli import console
from ks.cli.flags import TrainerConfig
from ks.errors import UsageError
from ks.files.layout import RunFiles
from ks.files.status import Status
from ks.training.checks import Diverged


class RunEnd(NamedTuple):
    """How a run ended; the message is None if it ended well. `is_fault`: of the program, which shows its traceback."""

    status: str
    exit_code: int
    message: str | None
    is_fault: bool = False


def end_of(error: BaseException | None, config: TrainerConfig, device: torch.device, files: RunFiles) -> RunEnd:
    """Classify what ended a run.

    Args:
        error: that ended it, or None.
        config, device, files: of the run, for the advice in the message.
    """
    if error is None:
        return RunEnd(Status.OK, console.EXIT_OK, None)
    if isinstance(error, Diverged):
        return RunEnd(Status.DIVERGED, console.EXIT_FAILED, str(error))
    if signals.came() or isinstance(error, KeyboardInterrupt):
        message = "interrupted; the finished epochs are kept, and --resume continues after them"
        return RunEnd(Status.INTERRUPTED, console.EXIT_INTERRUPTED, message)
    if _is_out_of_memory(error):
        smaller = max(1, config.batch_size // 2)
        advice = f"try --batch_size {smaller}, fewer --num_samples or --dtype bfloat16"
        return RunEnd(Status.OUT_OF_MEMORY, console.EXIT_FAILED, f"out of memory on {device}; {advice}")
    if isinstance(error, UsageError):
        return RunEnd(Status.FAILED, console.EXIT_USAGE, str(error))
    if isinstance(error, OSError):
        place = error.filename or files.directory
        advice = "fix the cause, then rerun the same command with --resume"
        return RunEnd(Status.FAILED, console.EXIT_FAILED, f"{error.strerror}: {place}; {advice}")
    return RunEnd(Status.FAILED, console.EXIT_FAILED, f"{type(error).__name__}: {error}", is_fault=True)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; the CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
