"""One rank above saturation is trained, the others are copies under their own names."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import files_of, read_table

import ks
import rank_sweep_study
from ks.files.atomic import read_json, write_json
from ks.files.curves import read_curves, write_curves
from ks.files.status import OK, Ending, Status
from ks.layer import KSLinear
from ks.study.copies import copies_of, copy_results
from ks.study.run import Result, result_of, runs_of

CONFIG = rank_sweep_study.build_parser().parse(["--weight_path", "w.pth", "--seeds", "0", "1"])
ROW = {"epoch": 1, "train_loss": 0.1, "val_loss": 0.2, "rank": 4, "lr": 0.1}


def runs(tmp_path, *ranks):
    return runs_of(CONFIG, list(ranks), tmp_path, Path("trainer.py"))


def ranks_of(copies):
    return {(run.rank, run.seed): source.rank for run, source in copies.items()}


def test_the_smallest_saturated_rank_is_trained(tmp_path):
    found = {run: Result(run, Ending(Status.NOT_STARTED), [], None) for run in runs(tmp_path, 2, 4, 9, 100)}
    assert ranks_of(copies_of(found, 4, found)) == {(rank, seed): 4 for rank in (9, 100) for seed in (0, 1)}
    assert copies_of(found, 200, found) == {}


def test_what_was_trained_before_is_the_source(tmp_path):
    found = {run: Result(run, Ending(Status.NOT_STARTED), [], None) for run in runs(tmp_path, 4, 9, 100)}
    for run in found:
        if run.rank == 9:
            found[run] = replace(found[run], ending=OK, curves=[ROW], copy_of=100)
        if run.rank == 100:
            found[run] = replace(found[run], ending=OK, curves=[ROW])
    assert set(ranks_of(copies_of(found, 4, found)).values()) == {100}


@pytest.fixture
def trained(tmp_path):
    source, _, target, _ = runs(tmp_path, 4, 9)
    source.files.directory.mkdir()
    write_curves(source.files, [ROW])
    for path in (source.files.final, source.files.best):
        KSLinear(4, 4).save(path)
    write_json(
        source.files.config,
        {"settings": {"rank": 4, "weight": "w", "inputs": "isotropic"}, "files": ["rank_4_final.pth"]},
    )
    write_json(source.files.training_log, {"status": Status.FINISHED, "train_seconds": 2.0})
    return source, target


def test_a_copy_is_a_finished_run_of_its_own_rank(trained):
    source, target = trained
    copy_results(source.files, target.files)
    result = result_of(target, 1, study={"weight": "w", "inputs": "isotropic"})
    assert str(result.ending) == "ok (copy of rank 4)"
    assert (result.copy_of, result.train_seconds) == (4, 2.0)
    assert [row["rank"] for row in read_curves(target.files.curves_csv)] == [9]
    assert read_json(target.files.config)["settings"]["rank"] == 9
    assert set(read_json(target.files.config)["files"]) == {path.name for path in target.files.results()}
    assert ks.load(target.files.best).to_dense().equal(ks.load(source.files.best).to_dense())


def test_a_sweep_trains_one_saturated_rank_and_adds_a_smaller_one_as_a_copy(run, weight_path, tmp_path):
    common = ("--weight_path", weight_path, "--num_epochs", 2, "--num_samples", 80, "--batch_size", 16)
    done = run("rank_sweep_study.py", *common, "--ranks", 2, 9, 100)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "rank_sweep_results"
    rows = read_table(study / "rank_sweep_summary.csv")
    assert [(row["rank"], row["status"]) for row in rows] == [
        ("2", "ok"),
        ("9", "ok"),
        ("100", "ok (copy of rank 9)"),
    ]
    assert rows[1]["population_loss"] == rows[2]["population_loss"] != ""
    assert "rank 100: training" not in done.stderr
    assert "Dominated, by a rank with no more parameters and no more loss: 100 by 9." in done.stdout
    done = run("rank_sweep_study.py", *common, "--ranks", 4, 9)
    assert done.returncode == 0, done.stderr
    assert "training (" not in done.stderr
    assert str(result_of_rank(study, 4)["copy_of"]) == "9"
    assert ks.load(files_of(study, 4).final).to_dense().equal(ks.load(files_of(study, 9).final).to_dense())


def result_of_rank(study, rank):
    return read_json(files_of(study, rank).training_log)
