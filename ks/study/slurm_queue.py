"""The queue of SLURM: how the jobs of a name stand, and its programs, which may not answer."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable

from ks.cli.console import note
from ks.study.processes import POLL_SECONDS

QUEUE_SECONDS = 5.0
GRACE_SECONDS = 10.0  # a network file system may show a record later than SLURM shows the end of its job
SILENT_SECONDS = 3600.0  # after which a queue that does not answer counts as empty
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
UNINTERESTING = {"None", "JobArrayTaskLimit"}  # the latter is --jobs
ENDED_FOR_GOOD = {"CANCELLED", "DEADLINE", "FAILED", "OUT_OF_MEMORY"}


class Queue:
    """The jobs of a sweep in the queue of SLURM, which is asked every few seconds."""

    def __init__(self, name: str, quiet: bool):
        self.name, self.quiet = name, quiet
        self._found: dict[str, tuple[str, str]] = {}
        self._left: dict[str, float] = {}  # since when
        self._asked, self._answered, self._reported = 0.0, time.monotonic(), ""

    def ask(self, jobs: Iterable[str]) -> None:
        """Find out how these jobs stand, unless that was done just now."""
        now = time.monotonic()
        if now - self._asked < QUEUE_SECONDS:
            return
        self._asked, found = now, _squeue(self.name)
        if found is None and now - self._answered < SILENT_SECONDS:
            return
        if found is not None:
            self._answered = now
        self._found = found or {}
        for job in jobs:
            if self.state(job) in ENDED or job not in self._found:
                self._left.setdefault(job, now)
            else:
                self._left.pop(job, None)

    def state(self, job: str) -> str:
        """Return the state of a job in the word of SLURM."""
        return self._found.get(job, ("not in the queue", ""))[0]

    def has_left(self, job: str) -> bool:
        """Return whether a job has ended so long ago that its records must be here."""
        return time.monotonic() - self._left.get(job, float("inf")) > GRACE_SECONDS

    def report_reasons(self, some_run: bool) -> None:
        """Print why jobs are pending while no run has begun, once for each reason."""
        reasons = sorted({reason for state, reason in self._found.values() if state == "PENDING"} - UNINTERESTING)
        text = f"waiting for SLURM ({', '.join(reasons)})"
        if reasons and not some_run and text != self._reported:
            self._reported = text
            note(text, self.quiet)


def wait_for_end(name: str, seconds: float) -> bool:
    """Return whether all jobs of a name have left the queue, which may take some seconds."""
    deadline = time.monotonic() + seconds
    while (ids := in_queue(name)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return ids == []


def in_queue(name: str) -> list[str] | None:
    """Return the ids of the jobs of a name that have not ended; None if SLURM does not answer."""
    found = _squeue(name)
    return None if found is None else [job for job, (state, _) in found.items() if state not in ENDED]


def _squeue(name: str) -> dict[str, tuple[str, str]] | None:
    """Return the state and the reason of each job of a name, as long as SLURM remembers it; None without an answer."""
    done = call(["squeue", "--noheader", "--array", "--states=all", f"--name={name}", "--format=%i|%T|%r"])
    if done is None or done.returncode:
        return None
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {job: ("LAUNCH_FAILED" if _is_held(reason) else state, reason) for job, state, reason in rows}


def _is_held(reason: str) -> bool:
    """Return whether SLURM keeps a job in its queue for ever, since it could not begin it."""
    return reason.replace("_", " ").startswith(("launch failed", "JobHoldMaxRequeue"))


def call(command: list[str], input: str = "") -> subprocess.CompletedProcess | None:
    """Call a program of SLURM, without the filters of a user's squeue; return None if it does not answer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            command, input=input, capture_output=True, text=True, timeout=30, env=environment, start_new_session=True
        )
    return None


def in_words(ids: list[str]) -> str:
    """Return jobs in words, an array as one."""
    numbers = list(dict.fromkeys(job.partition("_")[0] for job in ids))
    return f"SLURM job{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
