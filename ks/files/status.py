"""How a run stands or ended: one word, in its log, in the summary and for the exit code."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """State of a run."""

    RUNNING = "running"
    OK = "ok"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    TIMED_OUT = "timed out"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    NOT_STARTED = "not started"

    @classmethod
    def of(cls, word: str) -> "Status | None":
        """Return the status that a log names; earlier versions wrote "finished" for ok. None for any other word."""
        return next((status for status in cls if status == ("ok" if word == "finished" else word)), None)


@dataclass(frozen=True)
class Ending:
    """Status of a run, or of all the seeds of a rank, with its detail; `str` is the text of the summary."""

    status: Status
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status} ({self.detail})" if self.detail else str(self.status)


OK = Ending(Status.OK)


def ended_well(status: object) -> bool:
    """Return whether an `Ending`, or its text from a file, is that of a run that ended well."""
    return str(status).split(" (")[0] == Status.OK
