"""Run many training processes. A launcher is a generator of (task, outcome) that stops what it started."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.2
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Task:
    """One process to run; its output goes to `log`."""

    name: str
    command: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Outcome:
    """How a task ended; a negative code is the signal that killed it."""

    returncode: int
    seconds: float


def run_local(tasks: Iterable[Task], poll: Callable[[Task], None]) -> Iterator[tuple[Task, Outcome]]:
    """Run the tasks one after another on this machine.

    Args:
        tasks: what to run, in this order.
        poll: called several times a second while a task runs.
    Yields:
        (task, outcome) as each ends; a failure is an outcome, never an exception.
    """
    for task in tasks:
        started = time.perf_counter()
        with open(task.log, "wb") as log:
            process = subprocess.Popen(
                task.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            while process.poll() is None:
                poll(task)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        finally:
            stop(process)
        poll(task)
        yield task, Outcome(process.returncode, time.perf_counter() - started)


def stop(process: subprocess.Popen) -> None:
    """End a process that may still run: TERM, five seconds, KILL."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
