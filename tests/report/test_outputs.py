"""The files of a sweep, from results in memory."""

import json
from pathlib import Path

import pytest

import rank_sweep_study
from ks.bounds.plan import make_plan
from ks.files import columns
from ks.files.atomic import read_json, write_csv, write_json
from ks.files.curves import write_curves
from ks.files.layout import SweepFiles
from ks.files.status import OK, Ending, Status
from ks.report.outputs import summarise, write_outputs
from ks.report.read_results import read_study
from ks.report.summary import floor_rows
from ks.studies.weight_study import record_of
from ks.sweep.run import Result, runs_of
from ks.training.losses import LossKind
from ks.training.problem import resolve


@pytest.fixture
def write(weight_path, tmp_path):
    """Write the outputs of a sweep of ranks 2 and 4, of which rank 2 was interrupted before it began."""

    def write_study(population_loss, kind=None):
        arguments = ["--weight_path", str(weight_path), "--formats", "svg", "--output_dir", str(tmp_path)]
        config = rank_sweep_study.build_parser().parse(arguments)
        problem = resolve(config)
        plan = make_plan(problem.internal_weight(), problem.chain, problem.inputs)
        runs = runs_of(config, [2, 4], tmp_path, Path("trainer.py"))
        row = {"epoch": 1, "train_loss": 9.0, "val_loss": 9.5, "rank": 4} | population_loss
        for run in runs:
            run.files.directory.mkdir()
        write_curves(runs[1].files, [row])
        write_json(
            runs[1].files.config,
            {"settings": {}} | ({"loss": {"name": kind.value, "reason": "a test"}} if kind else {}),
        )
        results = [Result(runs[0], Ending(Status.INTERRUPTED), [], None), Result(runs[1], OK, [row], 1.5)]
        run_rows, rows = summarise(results, dict(zip([2, 4], plan.floors([2, 4]))), problem, plan)
        record = record_of(config, problem, [2, 4])
        files = SweepFiles(tmp_path, "p")
        write_csv(files.floor_csv, columns.names(columns.FLOOR), floor_rows(plan, problem.predict_zero_loss))
        return files, write_outputs(config, files, record, results, run_rows, rows)

    return write_study


def test_all_is_written_and_reads_back(write):
    files, written = write({"population_loss": 9.2})
    figures = [files.figure(name, "svg") for name in ("loss_curves", "final_losses", "floor", "gap", "front")]
    assert written == [files.summary_csv, *figures, files.report]
    assert all(path.stat().st_size > 0 for path in written)
    assert files.summary_csv.read_text().splitlines()[0].split(",") == columns.names(columns.SUMMARY)
    first, second = json.loads(files.summary_json.read_text())
    assert (first["status"], second["status"]) == ("interrupted", "ok")
    assert second["verdict"].startswith("undertrained, saturated")
    assert list(read_study(files).curves["rank"]) == [4]


@pytest.mark.parametrize("kind", [None, *LossKind])
def test_the_kind_of_loss_is_that_of_any_run_that_has_one(write, kind):
    files, _ = write({"population_loss": 9.2}, kind)
    label = (kind or LossKind.MEAN_SQUARED_ERROR).value
    assert read_json(files.config)["loss"] == label
    shown = "share of the output energy lost" if label == LossKind.MEAN_SQUARED_ERROR.value else label
    assert f"<!-- {shown} -->" in files.figure("loss_curves", "svg").read_text()


def test_floors_are_left_out_without_population_losses(write):
    files, written = write({}, LossKind.OTHER)
    rows = read_json(files.summary_json)
    assert {row[name] for row in rows for name in ("loss_floor", "relative_loss", "removed_share")} == {None}
    assert [row["verdict"] for row in rows] == [None, "saturated, larger than dense"]
    assert files.figure("floor", "svg") not in written
