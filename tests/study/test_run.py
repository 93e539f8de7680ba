"""The runs of a sweep: their files and commands, and how each one is judged to have ended."""

import sys
from pathlib import Path

import pytest

import rank_sweep_study
import train_with_random
from ks.files.atomic import write_json
from ks.files.curves import write_curves
from ks.files.status import OK, Ending, Status
from ks.layer import KSLinear
from ks.study.launcher import Outcome
from ks.study.run import result_of, runs_of

EPOCHS = 2
FAILED = Ending(Status.FAILED, "exit 1")


def config_of(*arguments):
    return rank_sweep_study.build_parser().parse(["--weight_path", "w.pth", *arguments])


@pytest.fixture
def finished(tmp_path):
    """A run of rank 2 with all the files of a finished training."""
    (run,) = runs_of(config_of(), [2], tmp_path, Path("trainer.py"))
    run.files.directory.mkdir()
    rows = [{"epoch": epoch, "train_loss": 1.0, "val_loss": 0.5, "rank": 2} for epoch in range(1, EPOCHS + 1)]
    write_curves(run.files, rows)
    write_json(run.files.training_log, {"status": Status.FINISHED, "train_seconds": 1.5})
    for path in (run.files.final, run.files.best):
        KSLinear(4, 4).save(path)
    return run


def test_every_rank_and_seed_has_a_command_that_the_trainer_takes(tmp_path):
    config = config_of("--seeds", "3", "5", "3", "--lr", "0.01", "--bs_last", "--row_splits", "4", "4")
    runs = runs_of(config, [2, 8], tmp_path, Path("trainer.py"))
    assert [(run.rank, run.seed, run.task.name) for run in runs] == [
        (rank, seed, f"rank {rank}, seed {seed}") for rank in (2, 8) for seed in (3, 5)
    ]
    assert [run.files.directory.relative_to(tmp_path).as_posix() for run in runs[:2]] == ["rank_2", "rank_2/seed_5"]
    for run in runs:
        python, script, *arguments = run.task.command
        assert (python, script) == (sys.executable, "trainer.py")
        trained = train_with_random.build_parser().parse(arguments)
        assert (trained.rank, trained.seed, trained.resume) == (run.rank, run.seed, True)
        assert (Path(trained.output_dir), trained.save_prefix) == (run.files.directory, run.files.prefix)
        assert (trained.lr, trained.bs_last, trained.row_splits) == (0.01, True, (4, 4))
        assert Path(trained.weight_path).is_absolute()
        assert run.task.log == run.files.log


@pytest.mark.parametrize(
    ("outcome", "reported", "ending"),
    [
        (None, Status.FINISHED, OK),
        (None, "running", Ending(Status.INTERRUPTED)),
        (Outcome(0, 1.0), Status.FINISHED, OK),
        (Outcome(0, 1.0), "running", Ending(Status.FAILED, "exit 0")),
        (Outcome(1, 1.0), "diverged", Ending(Status.DIVERGED)),
        (Outcome(1, 1.0), "out of memory", Ending(Status.OUT_OF_MEMORY)),
        (Outcome(1, 1.0), "failed", FAILED),
        (Outcome(1, 0.0, error="no memory"), "diverged", Ending(Status.FAILED, "no memory")),
        (Outcome(4, 1.0), "diverged", Ending(Status.FAILED, "exit 4")),
        (Outcome(-9, 1.0), "running", Ending(Status.FAILED, "exit -9")),
        (Outcome(-15, 1.0, timed_out=True), "interrupted", Ending(Status.TIMED_OUT)),
    ],
    ids=str,
)
def test_an_ending_is_judged_by_exit_code_and_log(finished, outcome, reported, ending):
    write_json(finished.files.training_log, {"status": reported or "running", "train_seconds": 1.5})
    result = result_of(finished, EPOCHS, outcome)
    assert result.ending == ending
    assert len(result.curves) == EPOCHS
    assert result.train_seconds == 1.5


def test_a_damaged_log_is_said_and_the_run_is_judged_without_it(finished, capsys):
    write_json(finished.files.training_log, {"status": None, "train_seconds": 1.5})
    assert result_of(finished, EPOCHS, Outcome(1, 1.0)).ending == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{finished.files.training_log} is not valid")
    assert line.endswith("; rank 2 has failed")
    result = result_of(finished, EPOCHS)
    assert result.ending == Ending(Status.INTERRUPTED)
    assert (len(result.curves), result.train_seconds) == (EPOCHS, None)
    assert capsys.readouterr().err.endswith("; rank 2 is trained again\n")


def test_a_run_without_files_is_unfinished(tmp_path):
    (run,) = runs_of(config_of(), [2], tmp_path, Path("trainer.py"))
    result = result_of(run, EPOCHS)
    assert (result.ending, result.curves, result.train_seconds) == (Ending(Status.NOT_STARTED), [], None)
