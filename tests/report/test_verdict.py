import pytest
from study_rows import CHAIN, CURVES, make_row

from ks.bounds.floors import Floor
from ks.errors import InternalError
from ks.files.status import Ending, Status
from ks.report.summary import Reference, rank_row, run_row
from ks.report.verdict import check_above_floor, is_calibration_limited

DIVERGED = Ending(Status.DIVERGED)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"population": 0.2019}, "converged"),
        ({"population": 0.0202, "lower": 0.02, "train": 0.0202}, "converged"),
        ({"population": 0.0209, "lower": 0.02, "train": 0.0209}, "within 0.1% of the energy"),
        ({"population": 0.0211, "lower": 0.02, "train": 0.0211}, "undertrained"),
        ({"population": 0.0007, "lower": 0.00001, "upper": 0.000126, "train": 0.0007}, "within 0.1% of the energy"),
        ({"population": 0.0007, "lower": 0.0, "train": 0.0007}, "within 0.1% of the energy"),
        ({"population": 9e-7, "lower": 0.0, "train": 9e-7}, "converged"),
        ({"population": 0.9985, "lower": 0.99, "train": 0.9985}, "undertrained"),
        ({"population": 0.9909, "lower": 0.99, "train": 0.9909}, "within 0.1% of the energy"),
        ({"population": 0.9900999, "lower": 0.99, "train": 0.9900999}, "converged"),
        ({"population": 0.26, "train": 0.26}, "undertrained"),
        ({"population": 0.26, "train": 0.231}, "undertrained"),
        ({"population": 0.26, "train": 0.229}, "sample-limited"),
        ({"population": 0.26, "train": 0.1}, "sample-limited"),
        ({"population": 0.26, "lower": 0.2, "upper": 0.26}, "between its bounds"),
        ({"population": 0.2, "lower": 0.2, "upper": 0.26}, "converged, better than the best known chain"),
        ({"population": 0.2, "rank": 4}, "converged, saturated, larger than dense"),
        ({"population": 0.2, "rank": 3}, "converged, larger than dense"),
        ({"ending": DIVERGED}, None),
    ],
)
@pytest.mark.parametrize("predict_zero", [1.0, 8.0])
def test_verdicts_follow_the_stated_rules_in_any_unit(changes, expected, predict_zero):
    losses = {"population": 0.26, "train": 0.25, "lower": 0.2} | changes
    scaled = {name: value * predict_zero if isinstance(value, float) else value for name, value in losses.items()}
    assert make_row(**scaled, predict_zero=predict_zero)["verdict"] == expected


def test_under_the_loss_of_the_model_a_small_excess_is_one_of_the_zero_predictors_loss():
    run = run_row(2, [CURVES[1] | {"train_loss": 0.0209, "population_loss": 0.0209}])
    reference = Reference(1.0, identity={"loss_metric": "model_loss"})
    row = rank_row([run], CHAIN, Floor(2, 0.02, 0.02, True), reference)
    assert row["verdict"] == "within 0.1% of the zero predictor's loss"


def test_without_a_floor_only_the_marks_remain():
    run = run_row(4, CURVES)
    assert rank_row([run], CHAIN, None, Reference(1.0))["verdict"] == "saturated, larger than dense"
    assert rank_row([run])["verdict"] is None
    assert rank_row([run_row(1, CURVES)], CHAIN, None, Reference(1.0))["verdict"] is None


@pytest.mark.parametrize("predict_zero", [1.0, 3.0])
def test_below_the_floor_is_an_error_beyond_rounding(predict_zero):
    floor = Floor(2, 0.2, 0.2, True)
    check_above_floor(0.2 * (1 - 1e-10) * predict_zero, floor, predict_zero)
    with pytest.raises(InternalError, match=r"rank 2: the population loss, .* is below its floor"):
        check_above_floor(0.2 * (1 - 1e-7) * predict_zero, floor, predict_zero)
    check_above_floor(None, floor)
    check_above_floor(0.1, None)


@pytest.mark.parametrize(
    ("relative", "held_out", "count", "limited"),
    [(0.1, 0.2, 10_000, True), (0.1, 0.104, 10**9, False), (0.1, 0.106, 10**9, True), (0.1, 0.2, 30, False)],
)
def test_calibration_is_the_limit_where_unseen_inputs_lose_clearly_more(relative, held_out, count, limited):
    assert is_calibration_limited(relative, held_out, count) is limited
