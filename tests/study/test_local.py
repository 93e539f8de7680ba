"""Local processes: how each one ends, and what is stopped."""

import os
import sys

import pytest
from conftest import wait_for

from ks.study.local import LocalLauncher
from ks.study.placement import cpu_slots, gpu_slots
from ks.study.task import Task

PRINT_PLACE = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS'])"
PRINT_AND_SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def no_inherited_place(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def task(folder, name, *command):
    return Task(name, (sys.executable, "-c", *command), folder / f"{name}.log")


def run_all(tasks, slots, timeout=None):
    with LocalLauncher(slots, timeout) as launcher:
        return dict(launcher.run(tasks, lambda running: None))


def test_each_process_sees_its_place(tmp_path):
    slots = gpu_slots(["3", "7"], jobs=None, runs=4, cores=2)
    tasks = [task(tmp_path, f"task{number}", PRINT_PLACE) for number in range(4)]
    ended = run_all(tasks, slots)
    assert all(outcome.code == 0 for outcome in ended.values())
    assert sorted({one.log.read_text().strip() for one in tasks}) == ["3 1", "7 1"]


def test_outcomes_of_failures_and_of_the_rest(tmp_path):
    tasks = [task(tmp_path, "fails", "raise SystemExit(7)"), task(tmp_path, "hangs", "import time; time.sleep(60)")]
    ended = {one.name: outcome for one, outcome in run_all(tasks, cpu_slots(2, 2, 2), timeout=2).items()}
    assert ended["fails"].code == 7
    assert ended["hangs"].timed_out


def test_a_task_that_cannot_start_is_an_outcome_and_the_rest_run(tmp_path):
    missing = Task("missing", (str(tmp_path / "no_program"),), tmp_path / "missing.log")
    (tmp_path / "file").touch()
    no_folder = Task("no_folder", (sys.executable, "-c", "1"), tmp_path / "file" / "no.log")
    ended = {
        one.name: outcome for one, outcome in run_all([missing, no_folder, task(tmp_path, "last", "1")], [{}]).items()
    }
    assert "could not start: [Errno 2] No such file or directory" in ended["missing"].error
    assert "could not start" in ended["no_folder"].error
    assert (ended["last"].code, ended["last"].error) == (0, "")


def test_no_more_run_at_a_time_than_there_are_slots_and_in_the_given_order(tmp_path):
    tasks = [task(tmp_path, f"task{number}", "import time; time.sleep(0.3)") for number in range(3)]
    seen = []
    with LocalLauncher(cpu_slots(1, 3, 1)) as launcher:
        ended = [one for one, _ in launcher.run(tasks, lambda running: seen.append([task.name for task in running]))]
    assert ended == tasks
    assert {len(running) for running in seen} == {1}


def test_leaving_stops_what_still_runs_even_if_the_results_are_not_taken(tmp_path):
    quick, long = task(tmp_path, "quick", "pass"), task(tmp_path, "long", PRINT_AND_SLEEP)
    with LocalLauncher(cpu_slots(2, 2, 2)) as launcher:
        outcomes = launcher.run([quick, long], lambda running: None)
        first, _ = next(outcomes)
        assert first == quick
        wait_for(long.log.read_text)
    with pytest.raises(ProcessLookupError):
        os.kill(int(long.log.read_text()), 0)
