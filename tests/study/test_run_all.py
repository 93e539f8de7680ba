"""Progress of the runs: a bar on a terminal, lines elsewhere, nothing if quiet."""

import os
import sys
import time

import pytest
from conftest import QUICK

import rank_sweep_study
import train_with_random
from ks.cli.console import EXIT_INTERNAL, EXIT_OK
from ks.cli.flags import SweepConfig
from ks.files.atomic import write_json
from ks.files.curves import write_curves
from ks.files.layout import run_files
from ks.files.schema import TrainingLog
from ks.files.status import OK, Ending, Status
from ks.study import outputs, weight_study
from ks.study.processes import Exit, LocalLauncher, Task
from ks.study.run_all import Progress
from ks.study.runs import Result, Run
from ks.study.weight_study import WeightStudy


@pytest.fixture
def runs(tmp_path):
    """Runs of ranks 1 and 2 with empty folders."""
    made = []
    for rank in (1, 2):
        files = run_files(tmp_path, rank, 0, 0)
        files.directory.mkdir()
        made.append(Run(rank, 0, files, Task(f"rank {rank}", ("true",), files.log)))
    return made


def progress_of(runs, *floors, **flags):
    return Progress(SweepConfig(weight_path="w.pth", num_epochs=10, **flags), runs, *floors)


def train(run, epochs, **losses):
    row = {"train_loss": 1.0, "val_loss": 1.0, "rank": run.rank} | losses
    write_curves(run.files, [row | {"epoch": epoch} for epoch in range(1, epochs + 1)])


def ended(run, ending, val_loss=None, **losses):
    """Return a run's result and exit after 1.5 seconds."""
    curves = [] if val_loss is None else [{"val_loss": val_loss}]
    return Result(run, ending, curves, TrainingLog("ok", **losses)), Exit(0, 1.5)


def test_elsewhere_there_is_a_line_for_every_start_and_end(runs, capsys):
    progress = progress_of(runs)
    first, second = (run.task for run in runs)
    progress.poll([first])
    progress.poll([first, second])
    progress.end(*ended(runs[0], OK, val_loss=0.25))
    progress.poll([second])
    progress.end(*ended(runs[1], OK, val_loss=0.25, relative_loss=0.0125, loss_increase=0.004))
    progress.close()
    expected = ["rank 1: training (1 of 2)", "rank 2: training (2 of 2)", "rank 1: ok, validation loss 0.25, 1.5 s"]
    expected.append("rank 2: ok, relative loss 1.25%, loss increase 0.004, 1.5 s")
    assert capsys.readouterr().err.splitlines() == expected


def test_by_the_loss_of_the_model_the_energy_that_is_lost_has_its_name(runs, capsys):
    progress = progress_of(runs, loss_metric="model_loss")
    progress.end(*ended(runs[0], OK, relative_loss=0.26, energy_loss=0.28, loss_increase=0.004))
    assert capsys.readouterr().err == "rank 1: ok, energy loss 28.00%, loss increase 0.004, 1.5 s\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_quiet(runs, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    progress = progress_of(runs, quiet=True)
    progress.poll([run.task for run in runs])
    progress.end(*ended(runs[0], OK))
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_of_all_epochs(runs, monkeypatch, capsys):
    """An ended run counts as all its epochs, so that the bar is full at the end also if one has failed."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = progress_of(runs, {1: 0.8})
    first, second = runs
    progress.poll([first.task, second.task])
    assert (progress.bar.n, progress.bar.total) == (0, 20)
    train(first, 3, population_loss=0.9)
    train(second, 4)
    progress.poll([first.task, second.task])
    assert progress.bar.n == 7
    first.task.log.write_text("".join(f"line {number}\n" for number in range(40)))
    progress.end(*ended(first, Ending(Status.FAILED, "exit 1")))
    progress.poll([second.task])
    assert progress.bar.n == 14
    progress.close()
    printed = capsys.readouterr().err
    assert f"rank 1: failed (exit 1), 1.5 s; end of {first.task.log}:\n  line 25\n" in printed
    assert "line 39" in printed
    assert "line 24" not in printed
    assert "7/20 epochs, " in printed
    assert "rank 1: 3/10, loss 1, gap 12.50%; rank 2: 4/10, loss 1" in printed
    assert "training (" not in printed


def test_a_resumed_run_prints_where_it_resumes_and_its_old_epochs_take_no_time(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run, other = runs
    train(run, 4)
    run.files.resume.touch()
    write_json(run.files.training_log, {"status": "interrupted", "resumed_after": 1})
    hour_ago = time.time() - 3600
    os.utime(run.files.training_log, (hour_ago, hour_ago))
    progress = progress_of(runs)
    progress.poll([run.task, other.task])
    assert (progress.bar.n, progress.bar.initial) == (4, 4)
    write_json(run.files.training_log, {"status": "running"})
    progress.poll([run.task])
    write_json(run.files.training_log, {"status": "running", "resumed_after": 3})
    progress.poll([run.task])
    progress.poll([run.task])
    progress.close()
    printed = capsys.readouterr().err
    assert printed.count("resumes after") == printed.count("rank 1: resumes after epoch 3\n") == 1


@pytest.mark.parametrize("failing", ["nothing", "write_floors", "certify"])
def test_the_sweep_works_while_runs_train_and_what_fails_then_fails_again_at_the_end(
    weight_path, tmp_path, monkeypatch, blank_pictures, failing
):
    steps = []

    def recorded(name, function):
        def record(*arguments):
            steps.append(name)
            assert failing != name
            return function(*arguments)

        return record

    def run(self, tasks, poll):
        for task in tasks:
            for _ in range(100):
                poll([task])
                time.sleep(0.001)
            assert train_with_random.main([*task.command[2:], "--quiet"]) == 0
            steps.append(task.name)
            yield task, Exit(0, 1.0)

    monkeypatch.setattr(LocalLauncher, "run", run)
    for place, name in ((WeightStudy, "write_floors"), (weight_study, "certify"), (outputs, "rehearse")):
        monkeypatch.setattr(place, name, recorded(name, getattr(place, name)))
    arguments = ["--weight_path", str(weight_path), "--output_dir", str(tmp_path / "out"), "--ranks", "1", "2", "4"]
    code = rank_sweep_study.main([*arguments, *QUICK])
    assert code == (EXIT_OK if failing == "nothing" else EXIT_INTERNAL)
    assert [step for step in steps if step.startswith("rank")] == ["rank 4", "rank 2", "rank 1"]
    if failing == "nothing":
        expected = ["write_floors", "rank 4", "rank 2", "certify", "rehearse", "rank 1", "certify", "write_floors"]
        assert steps == expected
