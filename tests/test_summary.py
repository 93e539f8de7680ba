import math

import pytest
import torch

import ks
from ks import report, summary
from ks.factorize import Floor
from ks.plan import make_plan

CHAIN = ks.make_chain(16, 24)
CURVES = [
    {"epoch": 1, "train_loss": 0.3, "val_loss": 0.1 + 0.2, "rank": 2, "population_loss": math.nan},
    {"epoch": 2, "train_loss": 0.25, "val_loss": 0.35, "rank": 2, "population_loss": 0.26},
]


def make_row(population=0.26, train=0.25, lower=0.2, upper=None, rank=2, predict_zero=1.0, status="ok"):
    curves = [CURVES[1] | {"train_loss": train, "population_loss": population}]
    floor = Floor(rank, lower, upper or lower, upper is None)
    return summary.rank_row([summary.run_row(rank, curves, status)], CHAIN, floor, predict_zero)


def test_a_run_row_skips_what_is_not_finite_and_invents_nothing():
    diverged = CURVES[0] | {"epoch": 3, "train_loss": math.nan, "val_loss": math.nan}
    row = summary.run_row(2, [*CURVES, diverged], "diverged")
    assert (row["min_val_loss"], row["min_val_epoch"]) == (0.1 + 0.2, 1)
    assert (row["min_train_loss"], row["min_train_epoch"]) == (0.25, 2)
    assert row["final_val_loss"] is row["population_loss"] is None
    empty = summary.run_row(2, [], "failed")
    assert empty["final_val_loss"] is empty["min_train_epoch"] is None


def test_distances_to_the_floor():
    row = make_row(population=0.26, lower=0.2, predict_zero=2.0)
    assert row["optimality_gap"] == pytest.approx(0.3)
    assert row["excess"] == pytest.approx(0.03)
    assert row["relative_loss"] == pytest.approx(0.13)
    assert row["parameters"] == 2 * (16 * 4 + 24 * 4)
    assert row["compression_ratio"] == pytest.approx(16 * 24 / 320)


def test_a_negligible_floor_has_no_gap():
    assert make_row(lower=0.0)["optimality_gap"] is None
    assert make_row(lower=0.9e-6)["optimality_gap"] is None
    assert make_row(lower=1e-6)["optimality_gap"] is not None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"population": 0.2019}, "converged"),
        ({"population": 0.0209, "lower": 0.02, "train": 0.0209}, "converged"),
        ({"population": 0.9985, "lower": 0.99, "train": 0.9985}, "undertrained"),
        ({"population": 0.9909, "lower": 0.99, "train": 0.9909}, "converged"),
        ({"population": 0.26, "train": 0.26}, "undertrained"),
        ({"population": 0.26, "train": 0.231}, "undertrained"),
        ({"population": 0.26, "train": 0.229}, "sample-limited"),
        ({"population": 0.26, "train": 0.1}, "sample-limited"),
        ({"population": 0.26, "lower": 0.2, "upper": 0.26}, "converged"),
        ({"population": 0.2, "rank": 4}, "converged, saturated, larger than dense"),
        ({"population": 0.2, "rank": 3}, "converged, larger than dense"),
        ({"status": "diverged"}, None),
    ],
)
def test_verdicts_follow_the_stated_rules(changes, expected):
    assert make_row(**changes)["verdict"] == expected


def test_without_a_floor_only_the_marks_remain():
    run = summary.run_row(4, CURVES)
    assert summary.rank_row([run], CHAIN, None, 1.0)["verdict"] == "saturated, larger than dense"
    assert summary.rank_row([run])["verdict"] is None


def test_below_the_floor_is_an_error_beyond_rounding():
    floor = Floor(2, 0.2, 0.2, True)
    summary.check_above_floor(0.2 * (1 - 1e-10), floor, 1.0)
    with pytest.raises(AssertionError, match="rank 2: population loss .* is below its floor"):
        summary.check_above_floor(0.2 * (1 - 1e-7), floor, 1.0)


def test_seeds_are_averaged_with_standard_errors_and_failures_counted():
    runs = [summary.run_row(2, [CURVES[1] | {"val_loss": loss}], seed=seed) for seed, loss in enumerate((0.3, 0.5))]
    row = summary.rank_row(runs)
    assert row["final_val_loss"] == pytest.approx(0.4)
    assert row["final_val_loss_se"] == pytest.approx(0.1)
    assert row["num_seeds"] == 2
    runs.append(summary.run_row(2, [], "diverged", seed=2))
    row = summary.rank_row(runs)
    assert row["status"] == "diverged (1 of 3 seeds)"
    assert row["num_seeds"] == 2
    assert row["final_val_loss"] == pytest.approx(0.4)


def test_advice_is_plain():
    rows = [
        make_row(population=0.26, train=0.1),
        make_row(population=0.26, train=0.26, rank=3),
        make_row(status="diverged"),
    ]
    sentences = summary.advice(rows, "fixed")
    assert sentences[0].startswith("rank 2: 30% above its floor and training loss well below that: sample-limited")
    assert "--sampling whitened, fresh" in sentences[0]
    assert "--num_epochs" in sentences[1]
    assert "train.log" in sentences[2]
    assert "larger" not in sentences[0]
    assert sentences[3] == "rank 3: more parameters than the dense weight"


@pytest.mark.parametrize("family", ["monarch", "lowrank", "butterfly"])
def test_the_smallest_rank_for_a_target_is_the_smallest(family):
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    plan = make_plan(weight, ks.make_chain(16, 24, family), predict_zero=7.0)
    lower, upper = plan.smallest_ranks(0.4)
    below, at = plan.floors([max(lower - 1, 1), lower])
    assert at.lower <= 0.4 * 7.0
    assert lower == 1 or below.lower > 0.4 * 7.0
    assert upper >= lower
    if upper > 1:
        before, reached = plan.floors([upper - 1, upper])
        assert reached.upper <= 0.4 * 7.0 < before.upper
    assert {lower, upper} <= set(plan.ranks_around(0.4))


def test_plan_floors_are_in_the_units_of_the_loss():
    weight = 100 * torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    sigma = 3.0
    predict_zero = sigma**2 * weight.square().sum().item() / 16
    plan = make_plan(weight, CHAIN, predict_zero)
    values = ks.KSLinear.from_dense(weight.double(), rank=2)
    expected = sigma**2 * (weight - values.to_dense()).square().sum().item() / 16
    assert plan.floors([2])[0].lower == pytest.approx(expected, rel=1e-6)
    assert plan.curve[0].item() == pytest.approx(predict_zero)


def test_the_plan_in_words():
    plan = make_plan(torch.eye(16, 24), ks.make_chain(16, 24, "butterfly"), 1.0)
    notes = report.plan_notes(plan, 0.5)
    assert notes[0].startswith("saturation: from rank")
    assert any(note.startswith("target 0.5") for note in notes)
    none = make_plan(torch.eye(16, 24), ks.make_chain(16, 24, "lowrank_butterfly"), 1.0)
    assert "no floor" in report.plan_notes(none, 0.5)[-1]
    assert none.floors([2]) == [None]
