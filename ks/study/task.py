"""A process to run, how it ended, and the interface of a launcher, which runs many of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

POLL_SECONDS = 0.1
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Task:
    """One process to run; its output goes to `log`. The command is an interpreter, a script and its arguments."""

    name: str
    command: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Exit:
    """How the process of a task ended; a negative code is the signal that killed it. error: why it could not start."""

    code: int
    seconds: float
    timed_out: bool = False
    error: str = ""


class Launcher(Protocol):
    """A place to run tasks: a context manager that holds whatever the place needs, and stops what still runs."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind, error, traceback) -> None: ...

    def run(self, tasks: Iterable[Task], poll: Callable[[list[Task]], None]) -> Iterator[tuple[Task, Exit]]:
        """Run tasks in the given order.

        Args:
            tasks: the processes.
            poll: called several times a second with the running tasks.
        Yields:
            (task, exit) as each ends; a failure is an exit, never an exception.
        """
        ...
