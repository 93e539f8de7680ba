"""Processes on this machine: how each one ends, and which ones are stopped."""

import os
import sys

import pytest
from conftest import wait_for

from ks.study.processes import LocalLauncher, Task

PRINT_AND_SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def task(folder, name, code):
    return Task(name, (sys.executable, "-c", code), folder / f"{name}.log")


def run_all(tasks, slots, timeout=None):
    """Return the exit of each task by its name, in the order in which they ended."""
    with LocalLauncher(slots, timeout) as launcher:
        return {one.name: exit for one, exit in launcher.run(tasks, lambda running: None)}


def test_a_failure_a_hang_and_a_task_that_cannot_start_leave_the_others(tmp_path):
    (tmp_path / "file").touch()
    tasks = [
        Task("no program", (str(tmp_path / "no_program"),), tmp_path / "missing.log"),
        Task("no folder", (sys.executable, "-c", "1"), tmp_path / "file" / "no.log"),
        task(tmp_path, "fails", "raise SystemExit(7)"),
        task(tmp_path, "hangs", "import time; time.sleep(60)"),
        task(tmp_path, "last", "1"),
    ]
    ended = run_all(tasks, [{}], timeout=2)
    assert "could not start: [Errno 2] No such file or directory" in ended["no program"].error
    assert "could not start" in ended["no folder"].error
    assert ended["fails"].code == 7
    assert ended["hangs"].timed_out
    assert (ended["last"].code, ended["last"].error) == (0, "")


def test_one_runs_in_each_slot_at_a_time_with_its_environment_and_in_the_given_order(tmp_path):
    tasks = [task(tmp_path, f"task{number}", "import os; print(os.environ['PLACE'])") for number in range(4)]
    seen = []
    with LocalLauncher([{"PLACE": "a"}, {"PLACE": "b"}]) as launcher:
        for _ in launcher.run(tasks, lambda running: seen.append(len(running))):
            pass
    assert max(seen) == 2
    assert sorted(one.log.read_text().strip() for one in tasks[:2]) == ["a", "b"]
    assert {one.log.read_text().strip() for one in tasks[2:]} <= {"a", "b"}
    assert list(run_all(tasks, [{"PLACE": "c"}])) == [one.name for one in tasks]


def test_leaving_stops_what_still_runs_even_if_the_results_are_not_taken(tmp_path):
    quick, long = task(tmp_path, "quick", "pass"), task(tmp_path, "long", PRINT_AND_SLEEP)
    with LocalLauncher([{}, {}]) as launcher:
        first, _ = next(launcher.run([quick, long], lambda running: None))
        assert first == quick
        wait_for(long.log.read_text)
    with pytest.raises(ProcessLookupError):
        os.kill(int(long.log.read_text()), 0)
