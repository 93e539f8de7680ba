"""Places for runs: the cores and GPUs of each run, and runs in the process of the sweep for a debugger."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK, ROOT, files_of, read_table

import rank_sweep_study
from ks import signals
from ks.errors import UsageError
from ks.study.launcher import InlineLauncher, slots_of
from ks.study.processes import Task


@pytest.fixture
def slots(monkeypatch):
    """Return the places of a sweep's runs on a machine with four cores and three GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    def slots(device, runs=9, **flags):
        config = SimpleNamespace(**{"jobs": "auto", "gpus": "auto", "device": device} | flags)
        return slots_of(config, torch.device(device), runs)

    return slots


@pytest.mark.parametrize(
    ("jobs", "runs", "threads"),
    [("auto", 9, ["1"] * 4), ("auto", 2, ["2"] * 2), (1, 9, ["4"]), (3, 9, ["1"] * 3), (8, 9, ["1"] * 8)],
)
def test_the_cores_are_split_among_the_runs_on_a_cpu(slots, jobs, runs, threads):
    assert slots("cpu", runs, jobs=jobs) == [{"OMP_NUM_THREADS": count} for count in threads]


@pytest.mark.parametrize(
    ("inherited", "device", "flags", "gpus", "threads"),
    [
        ("", "cuda", {}, ["0", "1", "2"], "1"),
        ("", "cuda", {"gpus": "2,0"}, ["2", "0"], "2"),
        ("5,GPU-abc,7", "cuda", {}, ["5", "GPU-abc", "7"], "1"),
        ("5,GPU-abc,7", "cuda", {"gpus": "1"}, ["GPU-abc"], "4"),
        ("", "cuda", {"jobs": 1}, ["0"], "4"),
        ("", "cuda", {"runs": 2}, ["0", "1"], "2"),
        ("", "cuda:1", {}, [None], "4"),  # the runs are given --device cuda:1
    ],
    ids=str,
)
def test_every_gpu_gets_one_run_and_an_inherited_choice_is_respected(
    slots, monkeypatch, inherited, device, flags, gpus, threads
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    found = slots(device, **flags)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in found] == gpus
    assert {slot["OMP_NUM_THREADS"] for slot in found} == {threads}


@pytest.mark.parametrize("gpus", ["3", "0,0", "-1", "", "all", "0 1"])
def test_bad_gpus_are_refused(slots, gpus):
    with pytest.raises(UsageError, match=f"--gpus {gpus}: auto, none, or different numbers below 3"):
        slots("cuda", gpus=gpus)


def test_no_gpu_and_a_gpu_contradict_each_other(slots):
    with pytest.raises(UsageError, match="--gpus none together with --device cuda: give one or the other"):
        slots("cuda", gpus="none")


@pytest.fixture
def task(tmp_path):
    """Write a script with a main function, and return the task that calls it with the argument 7."""

    def make(name, main):
        (tmp_path / f"{name}.py").write_text(f"def main(argv):\n    {main}\n")
        return Task(name, ("python", str(tmp_path / f"{name}.py"), "7"), tmp_path / name / "train.log")

    return make


def test_inline_runs_end_with_their_exit_codes_and_a_bug_leaves_the_others(task, capfd):
    tasks = [task("bug", "raise RuntimeError('planted')"), task("threads", "import torch; torch.set_num_threads(5)")]
    tasks += [task("code", "return int(argv[0])")]
    threads = torch.get_num_threads()
    with InlineLauncher() as launcher:
        exits = [exit for _, exit in launcher.run(tasks, lambda running: None)]
    assert [exit.code for exit in exits] == [4, None, 7]
    assert "RuntimeError: planted" in capfd.readouterr().err
    assert torch.get_num_threads() == threads


def test_no_inline_run_starts_after_an_interrupt(task, monkeypatch):
    monkeypatch.setattr(signals, "came", lambda: True)
    runs = InlineLauncher().run([task("first", "return 130"), task("second", "return 0")], lambda running: None)
    assert next(runs)[1].code == 130
    with pytest.raises(KeyboardInterrupt):
        next(runs)


def test_a_breakpoint_stops_at_the_terminal_and_leaving_the_debugger_ends_the_sweep(
    edited_toolkit, weight_path, tmp_path
):
    broken = "def criterion(prediction, target):\n    breakpoint()\n    return (prediction - target).abs().mean()"
    edited_toolkit(criterion=broken)
    command = [sys.executable, "rank_sweep_study.py", "--weight_path", str(weight_path), "--ranks", "2", "1", *QUICK]
    command += ["--launcher", "inline"]
    typed = "p prediction.shape\nq\n"
    done = subprocess.run(command, cwd=tmp_path, input=typed, capture_output=True, text=True)
    assert "(Pdb) torch.Size([2, 16])" in done.stdout
    assert "stopping: finished epochs are kept" in done.stderr
    rows = read_table(tmp_path / "rank_sweep_results" / "rank_sweep_summary.csv")
    assert [row["status"] for row in rows] == ["not started", "not started"]


def test_the_results_of_inline_runs_are_those_of_processes(weight_path, tmp_path):
    for name in ("inline", "local"):
        folder = tmp_path / name
        arguments = ["--weight_path", str(weight_path), "--ranks", "2", "1", *QUICK, "--output_dir", str(folder)]
        command = [sys.executable, str(ROOT / "rank_sweep_study.py"), *arguments, "--launcher", name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    ours, theirs = (read_table(tmp_path / name / "rank_sweep_summary.csv") for name in ("inline", "local"))
    assert [row["final_val_loss"] for row in ours] == [row["final_val_loss"] for row in theirs]
    assert "--launcher inline" in files_of(tmp_path / "inline", 2).log.read_text()


@pytest.mark.parametrize("flag", ["--timeout_per_rank", "--gpus"])
def test_a_timeout_and_a_gpu_of_inline_runs_are_refused(weight_path, tmp_path, capsys, flag):
    arguments = ["--weight_path", str(weight_path), "--output_dir", str(tmp_path / "out"), "--ranks", "2"]
    assert rank_sweep_study.main([*arguments, "--launcher", "inline", flag, "1"]) == 2
    assert "leave out --timeout_per_rank and --gpus" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
