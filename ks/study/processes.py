"""The processes of a sweep: a task and its exit, the interface of a launcher, and the launcher of this machine.

A process is tied to its parent by a pipe, the lifeline, which closes when the parent ends, however it ends.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

POLL_SECONDS = 0.1
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
    """

    def __init__(self, slots: list[dict[str, str]], timeout: float | None = None):
        self.slots, self.timeout = slots, timeout
        self._running: list[_Process] = []
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
                    self._running.append(_Process(task, free[0], self._lifeline))
                    free.pop(0)
                except OSError as error:
                    yield task, Exit(1, 0.0, error=f"it could not start: {error}")
            poll([run.task for run in self._running])
            time.sleep(POLL_SECONDS)
            for run in [run for run in self._running if run.ended(self.timeout)]:
                self._running.remove(run)
                free.append(run.slot)
                yield run.task, Exit(run.process.returncode, time.monotonic() - run.started, run.timed_out)


class _Process:
    """A task in a process of its own."""

    def __init__(self, task: Task, slot: dict[str, str], lifeline: "Lifeline"):
        self.task, self.slot, self.started, self.timed_out = task, slot, time.monotonic(), False
        task.log.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted since the sweep began
        with open(task.log, "ab") as log:
            self.process = subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | slot | lifeline.environment,
                pass_fds=[lifeline.descriptor],
                start_new_session=True,
            )

    def ended(self, timeout: float | None) -> bool:
        if timeout is not None and self.process.poll() is None and time.monotonic() - self.started > timeout:
            self.timed_out = True
            stop([self.process])
        return self.process.poll() is not None


def stop(processes: list[subprocess.Popen]) -> None:
    """End processes that may still run, also stopped ones: TERM to all, then KILL after five seconds."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
