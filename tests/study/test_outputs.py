"""The files of a sweep, from results in memory."""

import json
from pathlib import Path

import pytest
from conftest import read_table

from ks.bounds.rank_floors import RankFloors, floor_rows
from ks.cli.flags import SweepConfig
from ks.files import columns
from ks.files.atomic import read_json, write_csv
from ks.files.curves import write_curves
from ks.files.schema import TrainingLog
from ks.files.status import OK, Ending, Status
from ks.report.read_results import read_study
from ks.study.folder import record_of
from ks.study.outputs import rehearse, summarise, write_outputs
from ks.study.runs import Result, runs_of
from ks.training.problem import resolve


@pytest.fixture
def write(weight_path, tmp_path):
    """Write the outputs of a sweep of ranks 2 and 4, of which rank 2 was interrupted before it began."""

    def write_study(added, criterion="mean_squared_error"):
        places = {"weight_path": str(weight_path), "output_dir": str(tmp_path)}
        config = SweepConfig(**places, formats=("svg",), metric=("r2",))
        problem = resolve(config)
        plan = RankFloors(problem.internal_weight(), problem.chain, problem.metric)
        runs = runs_of(config, [2, 4], Path("trainer.py"))
        row = {"epoch": 1, "train_loss": 9.0, "val_loss": 9.5, "rank": 4} | added
        for run in runs:
            run.files.directory.mkdir()
        write_curves(runs[1].files, [row])
        results = [Result(runs[0], Ending(Status.INTERRUPTED), [], TrainingLog(""))]
        results.append(Result(runs[1], OK, [row], TrainingLog("ok", 1.5, loss_increase=0.01)))
        run_rows, rows = summarise(config, problem, plan, results)
        record = record_of(config, problem, [2, 4])
        record["settings"]["criterion"] = criterion
        files = config.files()
        write_csv(files.floor_csv, columns.names(columns.FLOOR), floor_rows(plan, problem.predict_zero_loss))
        return files, write_outputs(config, record, results, run_rows, rows)

    return write_study


def test_all_is_written_and_reads_back_without_a_metric_that_has_no_values(write, capsys):
    files, written = write({"population_loss": 9.2})
    assert capsys.readouterr().err.splitlines()[-1].startswith("WARNING: --metric r2: no run of ")
    figures = [files.figure(name, "svg") for name in ("loss_curves", "final_losses", "floor", "gap", "front")]
    assert written == [files.summary_csv, *figures, files.report]
    assert all(path.stat().st_size > 0 for path in written)
    assert files.summary_csv.read_text().splitlines()[0].split(",") == columns.names(columns.SUMMARY)
    first, second = json.loads(files.summary_json.read_text())
    assert (first["status"], second["status"]) == ("interrupted", "ok")
    assert second["verdict"].startswith("undertrained, saturated")
    assert (first["loss_increase"], second["loss_increase"]) == (None, 0.01)
    assert [row["loss_increase"] for row in read_table(files.runs_csv)] == ["", "0.01"]
    assert list(read_study(files).curves["rank"]) == [4]


def test_a_rehearsal_draws_what_is_known_and_writes_nothing(write):
    files, _ = write({"population_loss": 9.2})
    rows = read_json(files.summary_json)[1:]
    for path in (files.summary_json, files.runs_csv, files.report):
        path.unlink()
    before = {path: path.read_bytes() for path in files.directory.glob("*") if path.is_file()}
    config = SweepConfig(weight_path="w.pth", output_dir=str(files.directory))
    assert len(list(rehearse(config, rows))) == 3 * 5  # five figures have data
    assert {path: path.read_bytes() for path in files.directory.glob("*") if path.is_file()} == before


def test_a_metric_is_a_column_of_every_table(write):
    files, written = write({"population_loss": 9.2, "r2": 0.5})
    for path in (files.summary_csv, files.runs_csv):
        (empty, full) = read_table(path)
        assert (empty["final_r2"], full["final_r2"], full["best_r2"]) == ("", "0.5", "0.5")
    assert [row["final_r2"] for row in read_json(files.summary_json)] == [None, 0.5]
    assert {row["split"]: row["r2"] for row in read_table(files.all_curves_csv)}["validation"] == "0.5"
    assert files.figure("metric_r2", "svg") in written
    assert "metric_r2-" in files.report.read_text()


def test_another_criterion_is_a_label_and_without_population_losses_floors_are_left_out(write):
    files, written = write({}, "l1_loss of torch 2.13.0")
    assert "<!-- loss, l1_loss -->" in files.figure("loss_curves", "svg").read_text()
    rows = read_json(files.summary_json)
    assert {row[name] for row in rows for name in ("loss_floor", "relative_loss", "removed_share")} == {None}
    assert [row["verdict"] for row in rows] == [None, "saturated, larger than dense"]
    assert files.figure("floor", "svg") not in written
