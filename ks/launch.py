"""Run many training processes. A launcher is a generator of (task, outcome) that stops what it started."""

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.1
STOP_SECONDS = 5.0
PARENT = "KS_PARENT"  # the process id of the launcher, for a child to notice that it is gone


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
    timed_out: bool = False


def cpu_cores() -> int:
    """Cores that this process may use: OMP_NUM_THREADS where it is set, else those it is bound to."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_slots(jobs: int | None, runs: int, cores: int) -> list[dict[str, str]]:
    """Environments of the runs that train at the same time, the cores split among them.

    Args:
        jobs: how many at a time; None for one a core, the fastest (benchmarks/README.md).
        runs: how many there are.
        cores: to be used by all together.
    """
    jobs = min(jobs or cores, runs)
    return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))} for _ in range(jobs)]


def gpu_slots(gpus: list[str], runs_per_gpu: int, jobs: int | None, runs: int, cores: int) -> list[dict[str, str]]:
    """The same on CUDA devices: each run sees one device.

    Args:
        gpus: devices as CUDA_VISIBLE_DEVICES names them.
        runs_per_gpu: how many share a device.
        jobs: at most so many in all, or None.
        runs, cores: as in `cpu_slots`.
    """
    places = [gpu for _ in range(runs_per_gpu) for gpu in gpus][: min(jobs or runs, runs)]
    threads = str(max(1, cores // len(places)))
    return [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads} for gpu in places]


def choose_gpus(gpus: str, device_count: int) -> list[str]:
    """Resolve `--gpus`.

    Args:
        gpus: 'auto' (all), or positions such as '0,1' among the devices that this process sees.
        device_count: how many it sees.
    Returns:
        the devices as CUDA_VISIBLE_DEVICES names them, an inherited one honoured.
    Raises:
        ValueError: not such a list, or a device that is not there.
    """
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = inherited.split(",") if inherited else [str(index) for index in range(device_count)]
    if gpus == "auto":
        return names[:device_count]
    chosen = gpus.split(",")
    if not all(name.isdigit() and int(name) < device_count for name in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"--gpus {gpus}: auto, none, or different numbers below {device_count} such as 0,1 are allowed"
        )
    return [names[int(name)] for name in chosen]


class _Run:
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


def run_local(
    tasks: Iterable[Task],
    slots: list[dict[str, str]],
    poll: Callable[[list[Task]], None],
    timeout: float | None = None,
) -> Iterator[tuple[Task, Outcome]]:
    """Run tasks on this machine, as many at a time as there are slots.

    Args:
        tasks: what to run, in this order.
        slots: environment variables of each place.
        poll: called several times a second with the tasks that run.
        timeout: seconds after which a task is stopped, or None.
    Yields:
        (task, outcome) as each ends; a failure is an outcome, never an exception.
    """
    waiting, running, free = deque(tasks), [], list(slots)
    try:
        while waiting or running:
            while waiting and free:
                running.append(_Run(waiting.popleft(), free.pop(0)))
            poll([run.task for run in running])
            time.sleep(POLL_SECONDS)
            for run in [run for run in running if run.ended(timeout)]:
                running.remove(run)
                free.append(run.slot)
                yield run.task, run.outcome()
    finally:
        stop([run.process for run in running])


def stop(processes: list[subprocess.Popen]) -> None:
    """End processes that may still run: TERM to all, five seconds, KILL."""
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
    """In a child: send this process SIGTERM once the launcher that started it is gone."""
    parent = os.environ.get(PARENT, "")
    if not parent.isdigit():
        return

    def watch():
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
