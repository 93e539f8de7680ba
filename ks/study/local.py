"""The launcher of this machine: each run is a process of its own, as many at a time as there are slots."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from ks.study.lifeline import Lifeline
from ks.study.task import POLL_SECONDS, STOP_SECONDS, Exit, Task


class LocalLauncher:
    """Runs tasks on this machine.

    Args:
        slots: environment variables of the tasks that run at the same time, one entry each.
        timeout: seconds after which a task is stopped, or None.
    """

    def __init__(self, slots: list[dict[str, str]], timeout: float | None = None):
        self.slots, self.timeout = slots, timeout
        self._running: list[_Process] = []
        self._lifeline = Lifeline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        stop([run.process for run in self._running])
        self._lifeline.close()

    def run(self, tasks: Iterable[Task], poll: Callable[[list[Task]], None]) -> Iterator[tuple[Task, Exit]]:
        """Run tasks; see `ks.study.task.Launcher.run`."""
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
                yield run.task, run.exit()


class _Process:
    """A task in a process of its own."""

    def __init__(self, task: Task, slot: dict[str, str], lifeline: Lifeline):
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

    def exit(self) -> Exit:
        return Exit(self.process.returncode, time.monotonic() - self.started, self.timed_out)


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
