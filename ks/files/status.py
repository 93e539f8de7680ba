"""How a training ended."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """State of a run; the value is the word in its log and in the summary, where a finished run is ok."""

    RUNNING = "running"
    FINISHED = "finished"
    OK = "ok"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    TIMED_OUT = "timed out"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    NOT_STARTED = "not started"


@dataclass(frozen=True)
class Ending:
    """Status of a run, or of all the seeds of a rank, with its detail; `str` is the text of the summary."""

    status: Status
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status} ({self.detail})" if self.detail else str(self.status)


OK = Ending(Status.OK)


def ended_well(status: object) -> bool:
    """Return whether an `Ending`, or its text from a file, is that of a finished training or of a copy of one."""
    return str(status).split(" (")[0] == Status.OK
