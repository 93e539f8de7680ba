"""Sentences on ranks and above figures say no more than the rows of the summary do."""

import dataclasses
import math

import pytest
from drawn_study import DIVERGED, PLAN, make_study
from study_rows import make_row

from ks.files.status import Ending, Status
from ks.report.figures.draw import study_figures
from ks.report.sentences import advice, listed, recommendation


def heading(name, study):
    return study_figures(study, names=[name])[name].finding


def test_ranks_at_their_floors():
    study = make_study([2, 4], level=1.0, num_epochs=3000)
    (first, last), worst = study.summary["relative_loss"], study.summary["excess"].max()
    expected = {
        "loss_curves": f"Rank 4 loses {last:.2%} of the output energy; every rank is at its floor",
        "final_losses": f"From rank 2 to rank 4, the relative loss falls from {first:.2%} to {last:.2%}",
        "floor": f"No chain of rank 4 loses less than {PLAN.floor(4).lower:.2%}",
        "gap": f"Every rank ends at most {100 * worst:.2g}% of the output energy above its floor",
    }
    assert {name: heading(name, study) for name in expected} == expected
    small = dataclasses.replace(study, summary=study.summary.assign(verdict="within 0.1% of the energy, saturated"))
    assert heading("loss_curves", small).endswith("; every rank is within 0.1% of the energy")


def test_ranks_away_from_their_floors():
    study = make_study([2, 4])
    excess = f"{study.summary['excess'].max():.2%} of the output energy"
    assert heading("gap", study) == f"Rank 2 ends furthest above its floor, by {excess}; it is undertrained"
    assert heading("loss_curves", study).endswith("; every rank is undertrained")
    assert heading("loss_curves", make_study([4])).endswith("; it is undertrained")
    many = make_study(range(1, 13))
    many.summary.loc[0, "verdict"] = "converged"
    assert heading("loss_curves", many).endswith("; 11 of 12 ranks are undertrained")


def test_a_failed_rank_is_not_the_best():
    assert heading("loss_curves", make_study([2, 4], endings={4: DIVERGED})).startswith("Rank 2 loses ")


def test_ranks_between_two_bounds():
    study = make_study([2, 4], spread=1.2)
    bounds = study.summary["loss_floor"].iloc[1] / 2, study.summary["loss_floor_upper"].iloc[1] / 2
    assert heading("floor", study) == (
        f"At rank 4, the best known chain loses {bounds[1]:.2%}, and no chain loses less than {bounds[0]:.2%}"
    )
    assert "above its best known chain" in heading("gap", study)
    better = make_study([2, 4], level=0.9, num_epochs=3000, spread=1.3)
    assert (better.summary["excess"] < 0).all()
    assert heading("gap", better) == "No rank ends above its best known chain"


@pytest.mark.parametrize(
    ("target", "spread", "expected"),
    [
        (0.5, 1.0, "Rank {least} is the smallest that can reach the target of 50%"),
        (0.5, 1.01, "Rank 4 is the smallest trained rank that is known to be able to reach the target of 50%"),
        (0.5, 2.0, "No trained rank is known to be able to reach the target of 50%"),
        (1e-9, 1.0, "Rank {saturation} is the smallest that can reach the target of 1e-07%"),
    ],
)
def test_a_target_is_answered_by_the_floors(target, spread, expected):
    curve = PLAN.curve.tolist()
    ranks = {"least": next(rank for rank, loss in enumerate(curve) if loss <= target), "saturation": len(curve) - 1}
    assert heading("floor", make_study([2, 4], target=target, spread=spread)) == expected.format(**ranks)


@pytest.mark.parametrize(
    ("factors", "spread", "expected"),
    [
        ((1, 1), 1.0, "At equal size, every rank of monarch can lose less than low-rank"),
        ((0.1, 1), 1.0, "At equal size, rank 4 of monarch can lose less than low-rank; the other ranks cannot"),
        ((0.1, 0.1), 1.0, "At equal size, the trained ranks of monarch cannot lose less than low-rank"),
        ((0.1, 0.1), 1.1, "At equal size, the trained ranks of monarch are not known to lose less than low-rank"),
    ],
)
def test_the_front_compares_what_chains_can_lose_with_what_low_rank_can_at_equal_size(factors, spread, expected):
    study = make_study([2, 4], level=1.3, spread=spread)  # every run ends above low-rank
    for rank, factor in zip(study.lowrank_beside(study.summary["parameters"])["rank"], factors):
        study.floor.loc[(study.floor["chain"] == "lowrank") & (study.floor["rank"] == rank), "relative_loss"] *= factor
    assert heading("front", study) == expected


@pytest.mark.parametrize(("level", "factor", "better"), [(1.3, 0.1, True), (1.3, 1, False), (0.1, 1, False)])
def test_low_rank_opens_the_report_once_where_it_can_lose_less_than_the_rank_of_the_answer(level, factor, better):
    """In the second case, more epochs help."""
    others = ["Nothing below here has a number of a rank."]
    beside = "A low-rank factorisation of the same size (rank 16) can reach x."
    study = make_study([2, 4], level=level, num_epochs=1000, answer=[*others, beside])
    study.floor.loc[study.floor["chain"] == "lowrank", "relative_loss"] *= factor
    row = study.rows[1]
    lowrank = study.floor[(study.floor["chain"] == "lowrank") & (study.floor["parameters"] <= row["parameters"])]
    first = (
        f"Prefer a low-rank factorisation: at rank {len(lowrank)} it can reach {lowrank['relative_loss'].min():.2%}, "
        f"with no more parameters than this chain at rank 4, which is trained to {row['relative_loss']:.2%} and can "
        f"reach {row['relative_floor']:.2%}."
    )
    assert recommendation(study) == ([first, *others] if better else [*others, beside])


def row(rank, kind="dense", **times):
    """Return a row of a rank at its floor, with milliseconds of the chain and of dense or low-rank by batch size."""
    found = make_row(population=0.2, train=0.2) | {"rank": rank}
    for name, (chain, beside) in times.items():
        found |= {f"latency_ms_{name}": chain, f"{kind}_latency_ms_{name}": beside}
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(2, batch_1=(0.9, 1.0)), row(4, batch_1=(0.9, 1.0), batch_32=(0.1, 1.0))], []),
        (
            [row(2, batch_1=(2.0, 1.0)), row(64, batch_1=(0.96, 1.0), batch_1024=(2.0, 1.0))],
            ["Not faster than dense: every rank at batch 1; rank 64 at batch 1024."],
        ),
        (
            [row(2, "lowrank", batch_1=(1.06, 1.0)), row(4, "lowrank", batch_1=(1.04, 1.0), batch_32=(0.1, 1.0))],
            ["Slower than a low-rank factorisation of the same size: rank 2 at batch 1."],
        ),
        ([row(2), row(4, batch_1=(math.nan, math.nan), batch_32=(None, None))], []),  # nothing measured
    ],
)
def test_ranks_slower_than_dense_or_low_rank_by_more_than_noise_are_listed_by_batch_size(rows, expected):
    assert advice(rows) == expected


def test_low_rank_is_not_advised_against_itself():
    slow = row(2, "lowrank", batch_1=(2.0, 1.0))
    assert advice([slow | {"chain": "lowrank (rows 256·1, columns 1·512)"}]) == []
    assert advice([slow | {"chain": "lowrank_butterfly (rows 256·1, columns 1·512)"}]) != []


def test_the_figure_of_latency_says_whether_chains_are_faster_than_dense():
    slow, fast = (make_study([2, 4], times={2: (1.0, 2.0), 4: (time, 2.0)}) for time in (3.0, 1.0))
    assert heading("latency", slow) == (
        "Not faster than dense: rank 4 at batch 1; rank 4 at batch 32; rank 4 at batch 1024"
    )
    assert heading("latency", fast) == "Every chain is faster than dense at every batch size"


def test_lists_of_ranks():
    assert listed([2], 6) == "rank 2"
    assert listed([2, 4, 8], 6) == "ranks 2, 4 and 8"
    assert listed([1, 2, 3, 4, 5], 6) == "5 of 6 ranks"
    assert listed([1, 2], 2) == "every rank"


def test_advice_is_plain():
    rows = [
        make_row(population=0.26, train=0.1),
        make_row(population=0.26, train=0.26, rank=3),
        make_row(ending=DIVERGED),
        make_row(ending=Ending(Status.INTERRUPTED)),
        make_row(population=0.26, train=0.26, lower=0.0),
        make_row(population=0.0007, train=0.0007, lower=0.0001, upper=0.000126),  # many times a tiny floor
    ]
    assert advice(rows, "fixed") == [
        "Rank 2 is sample-limited: its loss is 6% of the output energy above the floor, where at most 0.20% would do, "
        "and the training loss shows less than half of this distance. Use --sampling auto or more samples.",
        "Rank 3 is undertrained: its loss is 6% of the output energy above the floor, where at most 0.20% would do. "
        "Increase --num_epochs.",
        "Rank 2: diverged; see its train.log.",
        "Rank 2 is undertrained: its loss is 26% of the output energy above the floor, where at most 0.10% would do. "
        "Increase --num_epochs.",
        "Rank 2 is within 0.1% of the energy: its loss exceeds that of the best known chain by 0.057% of the output "
        "energy. A larger --num_epochs gains little.",
        "Larger than the dense weight: rank 3.",
    ]
    assert "Use more samples." in advice(rows[:1], "fresh")[0]
