"""Runs in the process of the sweep, for a debugger."""

import subprocess
import sys

import pytest
import torch
from conftest import QUICK, ROOT, files_of, read_table

import rank_sweep_study
from ks import signals
from ks.study.inline import InlineLauncher
from ks.study.task import Task


@pytest.fixture
def task(tmp_path):
    def make(name, main):
        (tmp_path / f"{name}.py").write_text(f"def main(argv):\n    {main}\n")
        return Task(name, ("python", str(tmp_path / f"{name}.py"), "7"), tmp_path / name / "train.log")

    return make


def test_each_ends_with_its_exit_code_and_a_bug_leaves_the_others(task, capfd):
    tasks = [task("bug", "raise RuntimeError('planted')"), task("threads", "import torch; torch.set_num_threads(5)")]
    tasks += [task("code", "return int(argv[0])")]
    threads = torch.get_num_threads()
    with InlineLauncher() as launcher:
        exits = [exit for _, exit in launcher.run(tasks, lambda running: None)]
    assert [exit.code for exit in exits] == [4, None, 7]
    assert "RuntimeError: planted" in capfd.readouterr().err
    assert torch.get_num_threads() == threads


def test_no_run_starts_after_an_interrupt(task, monkeypatch):
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


def test_the_results_are_those_of_processes(weight_path, tmp_path):
    for name in ("inline", "local"):
        folder = tmp_path / name
        arguments = ["--weight_path", str(weight_path), "--ranks", "2", "1", *QUICK, "--output_dir", str(folder)]
        command = [sys.executable, str(ROOT / "rank_sweep_study.py"), *arguments, "--launcher", name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    ours, theirs = (read_table(tmp_path / name / "rank_sweep_summary.csv") for name in ("inline", "local"))
    assert [row["final_val_loss"] for row in ours] == [row["final_val_loss"] for row in theirs]
    assert "--launcher inline" in files_of(tmp_path / "inline", 2).log.read_text()


def test_a_timeout_is_refused(weight_path, tmp_path, capsys):
    arguments = ["--weight_path", str(weight_path), "--output_dir", str(tmp_path / "out"), "--ranks", "2"]
    assert rank_sweep_study.main([*arguments, "--launcher", "inline", "--timeout_per_rank", "5"]) == 2
    assert "leave out --timeout_per_rank" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
