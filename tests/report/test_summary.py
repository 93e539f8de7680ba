import math

import pytest
from study_rows import CHAIN, CURVES, make_row

from ks.bounds.floors import Floor
from ks.files import columns
from ks.files.atomic import read_json
from ks.files.layout import SweepFiles
from ks.files.schema import TrainingLog
from ks.files.status import OK, Ending, Status
from ks.report.summary import Reference, rank_row, run_row, summary_columns, summary_table, write_summary

DIVERGED = Ending(Status.DIVERGED)


def test_a_run_row_skips_what_is_not_finite_and_invents_nothing():
    diverged = CURVES[0] | {"epoch": 3, "train_loss": math.nan, "val_loss": math.nan}
    row = run_row(2, [*CURVES, diverged], DIVERGED)
    assert (row["min_val_loss"], row["min_val_epoch"]) == (0.1 + 0.2, 1)
    assert (row["min_train_loss"], row["min_train_epoch"]) == (0.25, 2)
    assert row["final_val_loss"] is row["population_loss"] is None
    empty = run_row(2, [], Ending(Status.FAILED, "exit 1"))
    assert empty["final_val_loss"] is empty["min_train_epoch"] is None
    assert set(row) == set(columns.names([*columns.RUNS, *columns.LATENCIES]))


def test_metrics_have_their_last_value_and_that_of_the_best_epoch():
    """The first epoch has the lowest validation loss."""
    curves = [CURVES[0] | {"r2": 0.6}, CURVES[1] | {"r2": 0.5, "new": 1.0}]
    row = run_row(2, curves)
    assert (row["final_r2"], row["best_r2"], row["final_new"], row["best_new"]) == (0.5, 0.6, 1.0, None)
    failed = run_row(2, curves, DIVERGED)
    assert (failed["final_r2"], failed["best_r2"]) == (None, 0.6)
    runs = [row, run_row(2, [CURVES[1] | {"r2": 0.7}], seed=1), failed, run_row(2, [], DIVERGED)]
    whole = rank_row(runs)
    assert (whole["final_r2"], whole["best_r2"]) == (pytest.approx(0.6), pytest.approx(0.65))
    assert (whole["final_new"], whole["best_new"]) == (1.0, None)


def test_distances_to_the_floor():
    row = make_row(population=0.26, lower=0.2, predict_zero=2.0)
    found = {name: row[name] for name in ("optimality_gap", "excess", "relative_loss", "removed_share")}
    assert found == pytest.approx(
        {"optimality_gap": 0.3, "excess": 0.03, "relative_loss": 0.13, "removed_share": 1.74 / 1.8}
    )
    assert (row["parameters"], row["compression_ratio"]) == (2 * (16 * 4 + 24 * 4), pytest.approx(16 * 24 / 320))
    assert make_row(population=0.26, lower=0.1, upper=0.2)["removed_share"] == pytest.approx(0.74 / 0.8)
    assert make_row(population=1.0, lower=1.0)["removed_share"] == 1  # nothing can be removed
    gaps = [make_row(lower=lower)["optimality_gap"] for lower in (0.0, 0.9e-6, 1e-6)]
    assert [gap is None for gap in gaps] == [True, True, False]


def test_floors_are_relative_in_memory_and_in_the_unit_of_the_losses_in_the_row():
    row = rank_row([run_row(2, CURVES)], CHAIN, Floor(2, 0.1, 0.125, False), Reference(2.0))
    assert (row["loss_floor"], row["loss_floor_upper"], row["loss_floor_is_exact"]) == (0.2, 0.25, False)
    exact = rank_row([run_row(2, CURVES)], CHAIN, Floor(2, 0.06192669976, 0.06192670344, True), Reference(2.0))
    assert exact["loss_floor"] == exact["loss_floor_upper"] == 2 * 0.06192669976
    assert set(columns.names(columns.SUMMARY)) <= set(row)


def test_the_gap_refers_to_the_best_known_chain_and_may_be_negative():
    row = make_row(population=0.19, lower=0.1, upper=0.2)
    assert row["optimality_gap"] == pytest.approx(-0.05)
    assert row["excess"] == pytest.approx(-0.01)
    assert row["verdict"] == "between its bounds, better than the best known chain"
    exact = make_row(population=0.2 - 1e-12, lower=0.2)
    assert (exact["optimality_gap"], exact["excess"]) == (0.0, 0.0)


def test_measured_inputs_have_columns_of_their_own():
    measured = Reference(2.0, held_out_predict_zero_loss=1.0, held_out_count=10_000, isotropic_floors=[*range(9)])
    row = rank_row([run_row(2, CURVES)], CHAIN, Floor(2, 0.13, 0.13, True), measured)
    assert (row["held_out_relative_loss"], row["isotropic_floor"]) == (0.35, 2.0)
    assert row["verdict"] == "converged, calibration-limited"
    assert make_row()["isotropic_floor"] is None


def test_seeds_are_averaged_with_standard_errors_and_failures_counted():
    runs = [run_row(2, [CURVES[1] | {"val_loss": loss}], seed=seed) for seed, loss in enumerate((0.3, 0.5))]
    row = rank_row(runs)
    assert row["final_val_loss"] == pytest.approx(0.4)
    assert row["final_val_loss_se"] == pytest.approx(0.1)
    assert row["num_seeds"] == 2
    again = rank_row([*runs, run_row(2, [], DIVERGED, seed=2)])
    assert str(again["status"]) == "diverged (1 of 3 seeds)"
    assert (again["num_seeds"], again["final_val_loss"]) == (2, row["final_val_loss"])


@pytest.mark.parametrize(
    ("endings", "text", "failed"),
    [
        ([OK, OK], "ok", False),
        ([Ending(Status.FAILED, "exit -9")], "failed (exit -9)", True),
        ([OK, Ending(Status.OUT_OF_MEMORY)], "out of memory (1 of 2 seeds)", True),
        ([Ending(Status.FAILED, "exit 4"), OK], "failed (exit 4; 1 of 2 seeds)", True),
        ([Ending(Status.INTERRUPTED)] * 2, "interrupted (2 of 2 seeds)", False),
    ],
    ids=str,
)
def test_the_status_of_a_rank_is_that_of_its_seeds(endings, text, failed):
    row = rank_row([run_row(2, CURVES, ending, seed) for seed, ending in enumerate(endings)])
    assert str(row["status"]) == text
    assert row["failed"] is failed


def whole_row():
    """A row with two bounds, measured inputs, several seeds and a known duration, so that no column is left out."""
    curves = [[CURVES[1] | {"population_loss": loss}] for loss in (0.26, 0.36)]
    log = TrainingLog("ok", 1.25, loss_increase=0.004, held_out_loss_increase=0.005, energy_loss=0.26)
    runs = [run_row(2, rows, seed=seed, log=log) for seed, rows in enumerate(curves)]
    measured = Reference(1.0, held_out_predict_zero_loss=1.1, held_out_count=100, isotropic_floors=[1.0] * 9)
    return rank_row(runs, CHAIN, Floor(2, 0.1, 0.2, False), measured) | {"status": "ok (copy of rank 1)"}


def test_the_printed_summary_has_the_columns_that_decide_then_the_details_in_their_forms():
    row = whole_row() | {"final_cosine": 0.123456, "best_cosine": 0.5}
    assert columns.names(summary_columns([row])) == [*columns.PRINTED]
    detailed = summary_table([row], verbose=True)
    assert detailed.startswith(summary_table([row]))
    assert "0.1235" in detailed
    for column in columns.chosen(columns.SUMMARY, (*columns.PRINTED, *columns.DETAILS)):
        assert {*column.form.format(row[column.name]).split()} <= {*detailed.split()}
    assert max(map(len, detailed.splitlines())) <= 100


def test_under_the_loss_of_the_model_all_losses_are_increases_and_the_energy_stands_beside():
    row = whole_row() | {"loss_metric": "model_loss", "loss_unit": "nats"}
    assert columns.names(summary_columns([row])) == [columns.INCREASE_FOR.get(name, name) for name in columns.PRINTED]
    printed = summary_table([row])
    assert "loss_increase: the predicted increase of the loss of the model, in nats per token." in printed
    assert "energy_loss: the fraction of the output energy that is lost." in printed
    assert "relative" not in printed


def test_losses_of_a_log_count_once_the_run_has_ended_well():
    log = TrainingLog("ok", loss_increase=0.004, held_out_loss_increase=0.005, energy_loss=0.26)
    known = rank_row([run_row(2, CURVES, seed=seed, log=log) for seed in (0, 1)])
    assert [known[name] for name in columns.EFFECTS] == [0.004, 0.005, 0.26]
    assert [run_row(2, CURVES, DIVERGED, log=log)[name] for name in columns.EFFECTS] == [None] * 3


def test_columns_that_say_nothing_are_left_out():
    assert not {"relative_floor_upper", "status"} & {*columns.names(summary_columns([make_row()]))}
    shown = summary_table([make_row(upper=0.22), make_row(ending=Ending(Status.FAILED, "exit 1"))])
    assert "floor_upper" in shown
    assert "failed (exit 1)" in shown
    above, header, values = summary_table([rank_row([run_row(1, CURVES)])]).splitlines()  # no relative loss is known
    assert (header.split(), values.split()) == (["rank", "val_loss", "train_loss"], ["1", "0.35", "0.25"])
    assert above.split() == ["final_", "final_"]


def test_a_summary_read_from_its_file_is_printed_as_the_one_in_memory(tmp_path):
    rows = [make_row(), make_row(rank=4), make_row(ending=Ending(Status.DIVERGED))]
    files = SweepFiles(tmp_path, "p")
    write_summary(files, rows)
    assert summary_table(read_json(files.summary_json)) == summary_table(rows)
