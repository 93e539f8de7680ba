"""The launcher of this machine: each training is a process of its own, as many at a time as there are slots."""

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from ks.sweep.launcher import POLL_SECONDS, STOP_SECONDS, Outcome, Task

PARENT = "KS_PARENT"  # the process id of the launcher, so that a child notices its end


class LocalLauncher:
    """Runs tasks on this machine.

    Args:
        slots: environment variables of the tasks that run at the same time, one entry each.
        timeout: seconds after which a task is stopped, or None.
    """

    def __init__(self, slots: list[dict[str, str]], timeout: float | None = None):
        self.slots, self.timeout = slots, timeout
        self._running: list[_Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        stop([run.process for run in self._running])

    def run(self, tasks: Iterable[Task], poll: Callable[[list[Task]], None]) -> Iterator[tuple[Task, Outcome]]:
        """Run tasks; see `ks.sweep.launcher.Launcher.run`."""
        waiting, free = deque(tasks), list(self.slots)
        while waiting or self._running:
            while waiting and free:
                self._running.append(_Process(waiting.popleft(), free.pop(0)))
            poll([run.task for run in self._running])
            time.sleep(POLL_SECONDS)
            for run in [run for run in self._running if run.ended(self.timeout)]:
                self._running.remove(run)
                free.append(run.slot)
                yield run.task, run.outcome()


class _Process:
    """A task in a process of its own."""

    def __init__(self, task: Task, slot: dict[str, str]):
        self.task, self.slot, self.started, self.timed_out = task, slot, time.monotonic(), False
        environment = os.environ | slot | {PARENT: str(os.getpid())}
        with open(task.log, "ab") as log:
            self.process = subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def ended(self, timeout: float | None) -> bool:
        if timeout is not None and self.process.poll() is None and time.monotonic() - self.started > timeout:
            self.timed_out = True
            stop([self.process])
        return self.process.poll() is not None

    def outcome(self) -> Outcome:
        return Outcome(self.process.returncode, time.monotonic() - self.started, self.timed_out)


def stop(processes: list[subprocess.Popen]) -> None:
    """End processes that may still run: TERM to all, then KILL after five seconds."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stop_with_parent() -> None:
    """In a child of a launcher: send this process SIGTERM when the launcher has ended."""
    parent = os.environ.get(PARENT, "")
    if not parent.isdigit():
        return

    def watch():
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
