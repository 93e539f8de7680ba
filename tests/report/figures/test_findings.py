"""The sentence above a figure says what the rows of the summary say."""

import pytest
from drawn_study import DIVERGED, PLAN, make_study, texts

from ks.report.figures.draw import study_figures

TIMES = {2: (1.0, 2.0), 4: (3.0, 2.0)}


def headings(study):
    return {name: texts(figure)[0].replace("\n", " ") for name, figure in study_figures(study).items()}


def test_ranks_at_their_floors():
    study = make_study([2, 4], level=1.0, num_epochs=3000)
    found, floors = headings(study), PLAN.floors([2, 4])
    first, last = study.summary["relative_loss"]
    assert found["loss_curves"] == f"Rank 4 loses {last:.2%}; every rank at its floor"
    assert found["final_losses"] == f"From rank 2 to 4, the share of energy lost falls from {first:.2%} to {last:.2%}"
    assert found["floor"] == f"No chain of rank 4 loses less than {floors[1].lower:.2%}"
    worst = study.summary["excess"].max()
    assert found["gap"] == f"Every rank ends at most {100 * worst:.2g}% of the energy above its floor"


def test_ranks_away_from_their_floors():
    study = make_study([2, 4])
    found, worst = headings(study), study.summary["excess"].max()
    assert found["loss_curves"].endswith("; every rank undertrained")
    assert found["gap"] == f"Rank 2 ends furthest above its floor, by {worst:.2%} of the energy: undertrained"
    assert headings(make_study([4]))["loss_curves"].endswith("; undertrained")


def test_ranks_better_than_their_best_known_chains():
    study = make_study([2, 4], level=0.9, num_epochs=3000, spread=1.3)
    assert (study.summary["excess"] < 0).all()
    assert headings(study)["gap"] == "No rank ends above its best known chain"


def test_a_small_excess_is_named():
    study = make_study([2, 4], level=1.0, num_epochs=3000)
    study.summary["verdict"] = "within 0.1% of the energy, saturated"
    assert headings(study)["loss_curves"].endswith("; every rank within 0.1% of the energy")


def test_many_ranks_are_counted():
    study = make_study(range(1, 13))
    study.summary.loc[0, "verdict"] = "converged"
    assert headings(study)["loss_curves"].endswith("; 11 of 12 ranks undertrained")


def test_a_failed_rank_is_not_the_best():
    assert headings(make_study([2, 4], endings={4: DIVERGED}))["loss_curves"].startswith("Rank 2 loses ")


@pytest.mark.parametrize(
    ("target", "spread", "expected"),
    [
        (0.5, 1.0, "Rank {least} is the smallest that can reach the target of 50%"),
        (0.5, 1.01, "No rank below {least} can reach the target of 50%; rank 4 can"),
        (0.5, 2.0, "No rank below {least} can reach the target of 50%; no trained rank is known to"),
        (1e-9, 1.0, "Rank {saturation} is the smallest that can reach the target of 1e-07%"),
    ],
)
def test_a_target_is_answered_by_the_floors(target, spread, expected):
    curve = PLAN.curve.tolist()
    ranks = {"least": next(rank for rank, loss in enumerate(curve) if loss <= target), "saturation": len(curve) - 1}
    assert headings(make_study([2, 4], target=target, spread=spread))["floor"] == expected.format(**ranks)


def test_bracketed_floors_are_said_to_be_a_pair():
    study = make_study([2, 4], spread=1.2)
    bounds = study.summary["loss_floor"].iloc[1] / 2, study.summary["loss_floor_upper"].iloc[1] / 2
    assert headings(study)["floor"] == f"Rank 4 can reach {bounds[1]:.2%}, and never less than {bounds[0]:.2%}"
    assert "above its best known chain" in headings(study)["gap"]


def test_the_front_compares_with_low_rank_at_equal_parameters():
    assert headings(make_study([2, 4], level=1.3))["front"] == (
        "At equal parameters, low-rank can lose less than every trained monarch chain"
    )
    assert headings(make_study([2, 4], level=0.1, num_epochs=1000))["front"] == (
        "Every trained monarch chain loses less than low-rank can at equal parameters"
    )


def test_a_chain_slower_than_dense_says_so():
    found = headings(make_study([2, 4], times=TIMES))["latency"]
    assert found == "Not faster than dense: rank 4 at batch 1; rank 4 at batch 32; rank 4 at batch 1024"
    both = {2: (1.0, 2.0), 4: (1.0, 2.0)}
    assert headings(make_study([2, 4], times=both))["latency"] == (
        "Every chain is faster than dense at every batch size"
    )
