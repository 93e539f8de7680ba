"""The runs of a sweep: their files and commands, and how each one is judged to have ended."""

import dataclasses
import sys
from pathlib import Path

import pytest

import ks
import rank_sweep_study
import train_with_random
from ks.files.atomic import read_json, write_json
from ks.files.curves import read_curves, write_curves
from ks.files.schema import Latency, TrainingLog
from ks.files.status import OK, Ending, Status
from ks.layer import KSLinear
from ks.study.processes import Exit
from ks.study.runs import Result, as_rank, result_of, runs_of, trained_ranks, were_disturbed

EPOCHS = 2
FAILED = Ending(Status.FAILED, "exit 1")


def runs_in(folder, ranks, *arguments):
    config = rank_sweep_study.build_parser().parse(["--weight_path", "w.pth", "--output_dir", str(folder), *arguments])
    return runs_of(config, ranks, Path("trainer.py"))


@pytest.fixture
def finished(tmp_path):
    """A run of rank 2 with all the files of a finished run."""
    (run,) = runs_in(tmp_path, [2])
    run.files.directory.mkdir()
    rows = [{"epoch": epoch, "train_loss": 1.0, "val_loss": 0.5, "rank": 2} for epoch in range(1, EPOCHS + 1)]
    write_curves(run.files, rows)
    write_json(run.files.training_log, {"status": Status.OK, "train_seconds": 1.5})
    for path in (run.files.final, run.files.best):
        KSLinear(4, 4).save(path)
    return run


def test_every_rank_and_seed_has_a_command_that_the_trainer_takes(tmp_path):
    flags = ("--seeds", "3", "5", "3", "--lr", "0.01", "--bs_last", "--row_splits", "4", "4")
    runs = runs_in(tmp_path, [2, 8], *flags)
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
    ("exit", "reported", "ending"),
    [
        (None, Status.OK, OK),
        (None, "finished", OK),  # of an earlier version
        (None, "running", Ending(Status.INTERRUPTED, "after epoch 2")),
        (None, "diverged", Ending(Status.DIVERGED)),
        (Exit(0, 1.0), Status.OK, OK),
        (Exit(0, 1.0), "running", Ending(Status.FAILED, "exit 0")),
        (Exit(1, 1.0), "diverged", Ending(Status.DIVERGED)),
        (Exit(1, 1.0), "out of memory", Ending(Status.OUT_OF_MEMORY)),
        (Exit(1, 1.0), "failed", FAILED),
        (Exit(1, 0.0, error="no memory"), "diverged", Ending(Status.FAILED, "no memory")),
        (Exit(4, 1.0), "diverged", Ending(Status.FAILED, "exit 4")),
        (Exit(-9, 1.0), "running", Ending(Status.FAILED, "exit -9")),
        (Exit(-15, 1.0, timed_out=True), "interrupted", Ending(Status.TIMED_OUT)),
    ],
    ids=str,
)
def test_an_ending_is_judged_by_exit_code_and_log(finished, exit, reported, ending):
    write_json(finished.files.training_log, {"status": reported or "running", "train_seconds": 1.5})
    result = result_of(finished, EPOCHS, exit)
    assert result.ending == ending
    assert len(result.curves) == EPOCHS
    assert result.log.train_seconds == 1.5


def test_a_damaged_log_is_reported_and_the_run_is_judged_without_it(finished, capsys):
    write_json(finished.files.training_log, {"status": None, "train_seconds": 1.5})
    assert result_of(finished, EPOCHS, Exit(1, 1.0)).ending == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{finished.files.training_log} is not valid")
    assert line.endswith("; rank 2 has failed")
    result = result_of(finished, EPOCHS)
    assert result.ending == Ending(Status.INTERRUPTED, "after epoch 2")
    assert (len(result.curves), result.log.train_seconds) == (EPOCHS, None)
    assert capsys.readouterr().err.endswith("; rank 2 is trained again\n")


def test_a_run_without_files_is_unfinished(tmp_path):
    (run,) = runs_in(tmp_path, [2])
    result = result_of(run, EPOCHS)
    assert (result.ending, result.curves, result.log.train_seconds) == (Ending(Status.NOT_STARTED), [], None)


@pytest.mark.parametrize(
    ("ranks", "begun", "trained"),
    [
        ([2, 4, 9, 100], [], {2: 2, 4: 4, 9: 4, 100: 4}),
        ([2, 9, 100], [], {2: 2, 9: 9, 100: 9}),
        ([4, 9, 100], [9, 2], {4: 9, 9: 9, 100: 9}),
        ([2, 3], [], {2: 2, 3: 3}),
    ],
    ids=str,
)
def test_one_rank_is_trained_for_all_from_saturation_on(tmp_path, ranks, begun, trained):
    for run in runs_in(tmp_path, begun):
        run.files.directory.mkdir()
        run.files.resume.touch()
    assert trained_ranks(ranks, 4, tmp_path) == trained


def test_a_rank_above_saturation_has_the_result_of_the_trained_one_in_its_own_folder(finished, tmp_path):
    settings = {"weight": "w", "inputs": "isotropic"}
    write_json(finished.files.config, {"settings": {**settings, "rank": 2}, "files": ["rank_2_final.pth"]})
    (run,) = runs_in(tmp_path, [9])
    result = as_rank(result_of(finished, EPOCHS), run)
    assert (result.run, str(result.ending), result.log.train_seconds) == (run, "ok (as rank 2)", 1.5)
    assert result_of(run, EPOCHS, study=settings).ending == OK
    assert [row["rank"] for row in read_curves(run.files.curves_csv)] == [9] * EPOCHS
    config = read_json(run.files.config)
    assert (config["settings"]["rank"], config["as_rank"]) == (9, 2)
    assert config["files"] == [path.name for path in run.files.results()]
    for name in ("final", "best"):
        assert ks.load(getattr(run.files, name)).to_dense().equal(ks.load(getattr(finished.files, name)).to_dense())


def test_a_trained_rank_keeps_its_files_even_as_another_run_object(finished):
    """A run of a checkpoint's layer has another name than the same run of the layer's study."""
    named = dataclasses.replace(finished, task=dataclasses.replace(finished.task, name="layer, rank 2"))
    before = finished.files.final.read_bytes()
    assert as_rank(result_of(finished, EPOCHS), named).ending == OK
    assert finished.files.final.read_bytes() == before


def test_a_failed_run_stands_for_a_rank_above_saturation_too(finished, tmp_path):
    (run,) = runs_in(tmp_path, [9])
    assert as_rank(result_of(finished, EPOCHS, Exit(-9, 1.0)), run).ending == Ending(Status.FAILED, "exit -9")


@pytest.mark.parametrize(
    ("named", "other", "device", "disturbed"),
    [
        (("10:00", "10:05"), ("10:04", "10:09"), "cpu", True),
        (("10:00", "10:05"), ("10:00", "10:05"), "cpu", True),
        (("10:00", "10:05"), ("10:01", "10:03"), "cpu", False),  # it ended before times were measured
        (("10:00", "10:05"), ("10:05", "10:09"), "cpu", False),
        (("10:05", "10:05"), ("10:00", "10:05"), "cpu", False),  # one after the other, within a second
        (("10:00", "10:05"), ("10:04", "10:09"), "cuda", False),
    ],
)
def test_times_are_disturbed_by_a_run_that_was_going_on_at_the_end_of_another(
    named, other, device, disturbed, tmp_path
):
    runs = runs_in(tmp_path, [2, 4, 8])
    logs = [
        TrainingLog("ok", started=a, ended=b, latency=Latency(threads=1, dtype="float32", device=device))
        for a, b in (named, other)
    ]
    results = [Result(run, OK, [], log) for run, log in zip(runs, [*logs, logs[0]])]  # the last one is a copy
    assert were_disturbed(results, 2) == were_disturbed(results, 8) == disturbed
