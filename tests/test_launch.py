"""Places and local processes: what each training is given, how it ends, what is stopped."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

import rank_sweep_study
from ks import launch

PRINT_PLACE = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS'])"


@pytest.fixture(autouse=True)
def no_inherited_place(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def task(folder, name, *command):
    return launch.Task(name, (sys.executable, "-c", *command), folder / f"{name}.log")


@pytest.mark.parametrize(
    ("jobs", "runs", "cores", "threads"),
    [(None, 9, 4, ["1"] * 4), (None, 2, 4, ["2"] * 2), (1, 9, 4, ["4"]), (3, 9, 4, ["1"] * 3), (8, 9, 4, ["1"] * 8)],
)
def test_cores_are_split_among_runs(jobs, runs, cores, threads):
    assert [slot["OMP_NUM_THREADS"] for slot in launch.cpu_slots(jobs, runs, cores)] == threads


def test_every_gpu_gets_one_run_before_any_gets_two():
    slots = launch.gpu_slots(["0", "1"], runs_per_gpu=2, jobs=None, runs=3, cores=6)
    assert slots == [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2"} for gpu in ("0", "1", "0")]
    assert len(launch.gpu_slots(["0", "1"], runs_per_gpu=2, jobs=1, runs=3, cores=6)) == 1


@pytest.mark.parametrize(
    ("inherited", "flag", "chosen"),
    [
        ("", "auto", ["0", "1", "2"]),
        ("", "2,0", ["2", "0"]),
        ("5,GPU-abc,7", "auto", ["5", "GPU-abc", "7"]),
        ("5,GPU-abc,7", "1", ["GPU-abc"]),
    ],
)
def test_an_inherited_choice_of_gpus_is_honoured(monkeypatch, inherited, flag, chosen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    assert launch.choose_gpus(flag, device_count=3) == chosen


@pytest.mark.parametrize("flag", ["3", "0,0", "-1", "", "all", "0 1"])
def test_bad_gpus_are_refused(flag):
    with pytest.raises(ValueError, match=f"--gpus {flag}: auto, none, or different numbers below 3"):
        launch.choose_gpus(flag, device_count=3)


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cuda", {}, ["0", "1"]),
        ("cuda", {"runs_per_gpu": 2}, ["0", "1", "0", "1"]),
        ("cuda", {"gpus": "1"}, ["1"]),
        ("cuda", {"jobs": 1}, ["0"]),
        ("cuda:1", {}, [None]),  # the trainings are given --device cuda:1
        ("cuda:1", {"runs_per_gpu": 2}, [None, None]),
        ("cpu", {"jobs": 2}, [None, None]),
    ],
    ids=str,
)
def test_places_of_a_sweep(monkeypatch, device, flags, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = SimpleNamespace(**{"jobs": "auto", "gpus": "auto", "runs_per_gpu": 1, "device": device} | flags)
    problem = SimpleNamespace(device=torch.device(device))
    slots = rank_sweep_study.slots_of(config, problem, runs=9)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots] == expected


def test_each_process_sees_its_place(tmp_path):
    slots = launch.gpu_slots(["3", "7"], runs_per_gpu=1, jobs=None, runs=4, cores=2)
    tasks = [task(tmp_path, f"task{number}", PRINT_PLACE) for number in range(4)]
    ended = dict(launch.run_local(tasks, slots, poll=lambda running: None))
    assert all(outcome.returncode == 0 for outcome in ended.values())
    assert sorted({one.log.read_text().strip() for one in tasks}) == ["3 1", "7 1"]


def test_outcomes_of_failures_and_of_the_rest(tmp_path):
    tasks = [task(tmp_path, "fails", "raise SystemExit(7)"), task(tmp_path, "hangs", "import time; time.sleep(60)")]
    slots = launch.cpu_slots(2, 2, 2)
    ended = {one.name: outcome for one, outcome in launch.run_local(tasks, slots, lambda running: None, timeout=2)}
    assert ended["fails"].returncode == 7
    assert ended["hangs"].timed_out


def test_any_exception_stops_what_was_started(tmp_path):
    long = task(tmp_path, "long", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")

    def poll(running):
        if long.log.read_text():
            raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        list(launch.run_local([long], launch.cpu_slots(1, 1, 1), poll))
    with pytest.raises(ProcessLookupError):
        os.kill(int(long.log.read_text()), 0)
