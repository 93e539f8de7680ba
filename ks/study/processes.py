"""The processes of a sweep: a task and its exit, the interface of a launcher, and the launcher of this machine.

A process is tied to its parent by a pipe, the lifeline, which closes when the parent ends, however it ends.
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

POLL_SECONDS = 0.1
WAKE_SECONDS = 0.01  # between looks at whether a process has ended
STOP_SECONDS = 5.0
VARIABLE = "KS_LIFELINE"  # file descriptor and inode of the pipe, so that a value from elsewhere is recognised
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl


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


class Process(Protocol):
    """A child of this process; a `subprocess.Popen` is one."""

    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit code, that of `Exit`; None while it runs."""

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""


# A way to start a script, with the arguments of `start_afresh`.
Start = Callable[[Sequence[str], dict[str, str], int, int, Sequence[int]], Process]


def start_afresh(
    command: Sequence[str], environment: dict[str, str], stdout: int, stderr: int, kept: Sequence[int]
) -> Process:
    """Start a script in a fresh interpreter, without input, as the leader of a session.

    Args:
        command: an interpreter, a script and its arguments.
        environment: of the script.
        stdout, stderr: descriptors for its output.
        kept: descriptors that it has too, under the same numbers.
    Raises:
        OSError: it cannot start.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        pass_fds=kept,
        start_new_session=True,
    )


class Launcher:
    """A place to run tasks: a context manager that holds whatever the place needs, and stops what still runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        pass

    def run(self, tasks: Iterable[Task], poll: Callable[[list[Task]], None]) -> Iterator[tuple[Task, Exit]]:
        """Run tasks in the given order.

        Args:
            tasks: the processes.
            poll: called several times a second with the running tasks.
        Yields:
            (task, exit) as each ends; a failure is an exit, never an exception.
        """
        raise NotImplementedError


class LocalLauncher(Launcher):
    """Runs each task in a process of its own, as many at a time as there are slots.

    Args:
        slots: environment variables of the tasks that run at the same time, one entry each.
        timeout: seconds after which a task is stopped, or None.
        start: starts a script.
    """

    def __init__(self, slots: list[dict[str, str]], timeout: float | None = None, start: Start = start_afresh):
        self.slots, self.timeout, self.start = slots, timeout, start
        self._running: list[_Running] = []
        self._lifeline = Lifeline()

    def __exit__(self, kind, error, traceback) -> None:
        stop([run.process for run in self._running])
        self._lifeline.close()

    def run(self, tasks: Iterable[Task], poll: Callable[[list[Task]], None]) -> Iterator[tuple[Task, Exit]]:
        waiting, free = deque(tasks), list(self.slots)
        while waiting or self._running:
            while waiting and free:
                task = waiting.popleft()
                try:
                    self._running.append(self._started(task, free[0]))
                    free.pop(0)
                except OSError as error:
                    yield task, Exit(1, 0.0, error=f"it could not start: {error}")
            poll([run.task for run in self._running])
            wait_for_one([run.process for run in self._running], POLL_SECONDS)
            for run in [run for run in self._running if run.ended(self.timeout)]:
                self._running.remove(run)
                free.append(run.slot)
                yield run.task, Exit(run.process.returncode or 0, time.monotonic() - run.started, run.timed_out)

    def _started(self, task: Task, slot: dict[str, str]) -> "_Running":
        task.log.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted since the sweep began
        environment, kept = os.environ | slot | self._lifeline.environment, [self._lifeline.descriptor]
        with open(task.log, "ab") as log:
            return _Running(task, slot, self.start(task.command, environment, log.fileno(), log.fileno(), kept))


class _Running:
    """A task in a process of its own."""

    def __init__(self, task: Task, slot: dict[str, str], process: Process):
        self.task, self.slot, self.process = task, slot, process
        self.started, self.timed_out = time.monotonic(), False

    def ended(self, timeout: float | None) -> bool:
        if timeout is not None and self.process.poll() is None and time.monotonic() - self.started > timeout:
            self.timed_out = True
            stop([self.process])
        return self.process.poll() is not None


def wait_for_one(processes: list[Process], seconds: float) -> None:
    """Wait until one of the processes has ended, for at most this many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        time.sleep(WAKE_SECONDS)


def stop(processes: list[Process]) -> None:
    """End processes that may still run, also stopped ones: TERM to all, then KILL after five seconds."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        wait_for_one([process], deadline - time.monotonic())
        process.send_signal(signal.SIGKILL)
        wait_for_one([process], math.inf)


class Lifeline:
    """The parent's side of the pipe; children are started with its `descriptor` in pass_fds and its `environment`."""

    def __init__(self):
        self.descriptor, self._held = os.pipe()
        self.environment = {VARIABLE: f"{self.descriptor}:{os.fstat(self.descriptor).st_ino}"}

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._held)


def stop_with_parent() -> None:
    """In a child that was given a lifeline: send this process SIGTERM when the parent has ended.

    On Linux this holds for a stopped child too: the end of its parent continues it.
    """
    descriptor, _, inode = os.environ.get(VARIABLE, "").partition(":")
    try:
        if os.fstat(int(descriptor)).st_ino != int(inode):
            return
    except (ValueError, OSError, OverflowError):
        return
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a libc without prctl
            ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGCONT)

    def watch():
        with contextlib.suppress(OSError):
            os.read(int(descriptor), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
