"""Progress: lines elsewhere, a bar on a terminal, nothing when quiet."""

import sys

import pytest

from ks.files.curves import write_curves
from ks.files.layout import run_files
from ks.files.status import OK, Ending, Status
from ks.sweep.launcher import Outcome, Task
from ks.sweep.progress import Progress, SlowWork
from ks.sweep.run import Result, Run


@pytest.fixture
def runs(tmp_path):
    """Runs of ranks 1 and 2 with empty folders."""
    made = []
    for rank in (1, 2):
        files = run_files(tmp_path, rank, 0, 0)
        files.directory.mkdir()
        made.append(Run(rank, 0, files, Task(f"rank {rank}", ("true",), files.log)))
    return made


def train(run, epochs):
    rows = [{"epoch": epoch, "train_loss": 1.0, "val_loss": 1.0, "rank": run.rank} for epoch in range(1, epochs + 1)]
    write_curves(run.files, rows)


def ended(run, ending, val_loss=None):
    """Return a run's result and outcome after 1.5 seconds."""
    curves = [] if val_loss is None else [{"val_loss": val_loss}]
    return Result(run, ending, curves, 1.0), Outcome(0, 1.5)


def test_elsewhere_there_is_a_line_for_every_start_and_end(runs, capsys):
    progress = Progress(runs, 10, quiet=False)
    first, second = (run.task for run in runs)
    progress.poll([first])
    progress.poll([first, second])
    progress.end(*ended(runs[0], OK, val_loss=0.25))
    progress.poll([second])
    progress.close()
    expected = ["rank 1: training (1 of 2)", "rank 2: training (2 of 2)", "rank 1: ok, validation loss 0.25, 1.5 s"]
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_quiet(runs, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    progress = Progress(runs, 10, quiet=True)
    progress.poll([run.task for run in runs])
    progress.end(*ended(runs[0], OK))
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_of_all_epochs(runs, monkeypatch, capsys):
    """An ended run counts as all its epochs, so that the bar is full at the end also if one has failed."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(runs, 10, quiet=False)
    first, second = runs
    progress.poll([first.task, second.task])
    assert (progress.bar.n, progress.bar.total) == (0, 20)
    train(first, 3)
    train(second, 4)
    progress.poll([first.task, second.task])
    assert progress.bar.n == 7
    first.task.log.write_text("".join(f"line {number}\n" for number in range(40)))
    progress.end(*ended(first, Ending(Status.FAILED, "exit 1")))
    progress.poll([second.task])
    assert progress.bar.n == 14
    progress.close()
    said = capsys.readouterr().err
    assert f"rank 1: failed (exit 1), 1.5 s; end of {first.task.log}:\n  line 25\n" in said
    assert "line 39" in said
    assert "line 24" not in said
    assert "rank 1, rank 2: " in said
    assert "training (" not in said


def test_slow_work_tells_how_far_it_is_after_two_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("ks.sweep.progress.time.monotonic", lambda: now[0])
    work = SlowWork(quiet=False)
    for second, step in ((1.0, "10%"), (2.1, "20%"), (3.0, "30%"), (4.5, "55%")):
        now[0] = second
        work(step)
    assert capsys.readouterr().err == "20%\n55%\n"
    quiet = SlowWork(quiet=True)
    now[0] = 99.0
    quiet("60%")
    assert capsys.readouterr().err == ""
