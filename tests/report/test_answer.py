"""The first sentence names a rank by the stated rules; remedies are those that would work."""

import re

import pytest
import torch
from measured import random_moment
from study_rows import make_row

import ks
from ks.bounds.rank_floors import RankFloors, TargetRanks
from ks.files.status import Ending, Status
from ks.report.answer import Facts, answer, knee, named_row, target_note
from ks.report.words import Words, percents
from ks.study.study_floors import find_facts, ranks_of_answer

CHAIN = ks.make_chain(64, 96)


def make_weight(rows=64, cols=96):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, rows, generator=generator))[0] for size in (rows, cols))
    weight = (left * torch.arange(1, rows + 1) ** -1.0) @ right.T
    return (weight * (rows**0.5 / weight.norm())).double()


FLOORS = RankFloors(make_weight(), CHAIN)


def rows_of(excess, floors=FLOORS, **changes):
    """Rows of trained ranks whose losses end this much above the upper bound."""
    rows = []
    for rank, above in excess.items():
        floor = floors.floor(rank)
        upper = None if floor.exact else floor.upper
        row = make_row(floor.upper + above, floor.upper + above, floor.lower, upper, rank, chain=floors.chain)
        rows.append(row | changes)
    return rows


def rows_with(losses, floor=None):
    """Rows of trained ranks with these losses, which are at their floors or above a common one."""
    return [make_row(loss, loss, loss if floor is None else floor, rank=r, chain=CHAIN) for r, loss in losses.items()]


def answer_of(rows, target=None, floors=FLOORS):
    return answer(rows, find_facts(rows, floors, target, 30.0), target)


def test_the_smallest_rank_that_reached_the_target_is_named():
    curve = FLOORS.curve
    rows = rows_of({2: 0.0, 4: 1e-4, 8: 0.0})
    first, second, *others = answer_of(rows, curve[4].item() + 2e-4)
    assert first.startswith("Rank 4 is the smallest trained rank that loses at most ")
    assert f"it loses {percents(curve[4].item() + 1e-4)[0]}, with 41.67% of the parameters" in first
    assert second == "No smaller rank can reach it."
    assert any(line.startswith("A low-rank factorisation of the same size (rank 16) can reach ") for line in others)


def test_a_smaller_rank_that_can_reach_the_target_is_named_too():
    target = FLOORS.curve[3].item() + 1e-5
    assert answer_of(rows_of({2: 0.0, 4: 0.0}), target)[1].startswith("Rank 3, which was not trained, can reach ")
    second = answer_of(rows_of({3: 1e-3, 4: 0.0}), target)[1]
    assert second.startswith("Rank 3 can reach ")
    assert "but ends at " in second


@pytest.mark.parametrize(
    ("above", "remedies"),
    [
        (0.004, "its floor is .* Use --num_epochs 100 or --ranks 5 "),
        (0.007, "Use --num_epochs 100 or "),  # at least twice the epochs
        (0.001, "Use --num_epochs 400 or "),
        (0.0001, "Use --ranks 5 "),  # the epochs would be more than ten times as many
        (-0.001, "; no rank below 5 can reach it. Use --ranks 5 "),
    ],
)
def test_a_target_that_is_missed_needs_epochs_if_they_can_help_or_a_rank_with_room(above, remedies):
    curve, target = FLOORS.curve, FLOORS.curve[4].item() + above
    first = answer_of(rows_of({2: 0.0, 4: 0.008}, num_epochs=50), target)[0]
    assert re.search(f"is not reached: rank 4 ends at .*{remedies}", first)
    assert curve[5] + 0.008 <= target < curve[4] + 0.008  # rank 5 is the smallest with room for the excess
    sampled = make_row(curve[4].item() + 0.008, 0.0, curve[4].item(), rank=4, chain=CHAIN)
    assert "--num_epochs" not in answer_of([sampled], target)[0]


def test_without_a_target_the_knee_is_named():
    rows = rows_with({1: 0.5, 2: 0.4, 4: 0.02, 8: 0.01})
    assert knee(rows)["rank"] == 4
    assert answer_of(rows)[0].startswith("Rank 4 is the knee of loss against parameters: it loses 2% of the output ")
    straight = rows_with({2: 1 / 2, 4: 1 / 4, 8: 1 / 8})
    assert knee(straight) is None
    first = answer_of(straight)[0]
    assert first.startswith("Rank 8 loses least: it loses 12.50%")
    assert "no knee, so choose with --target_relative_loss" in first
    assert knee(rows[:2]) is None
    assert "knee" not in answer_of(rows[:2])[0]


def test_an_exact_rank_is_the_answer():
    rows = rows_with({2: 0.1, 4: 1e-9, 8: 1e-10}, floor=0.0)
    assert answer_of(rows)[0].startswith("Rank 4 is the smallest trained rank that loses nothing")


def test_dominated_ranks_and_those_larger_than_dense_are_pointed_at():
    lines = answer_of(rows_with({2: 0.2, 4: 0.3, 16: 0.1, 20: 0.1}), 0.15)
    assert lines[-1] == "Dominated, by a rank with no more parameters and no more loss: 4 by 2, 20 by 16."
    assert "WARNING: rank 16 has more parameters than the dense weight." in lines


def test_a_slower_chain_and_held_out_inputs_that_miss_the_target_have_warnings():
    times = {"latency_ms_batch_1": 0.2, "dense_latency_ms_batch_1": 0.1}
    times |= {"latency_ms_batch_32": 0.2, "dense_latency_ms_batch_32": 0.3}
    rows = rows_of({4: 0.0}, **times, held_out_relative_loss=0.3)
    assert [line for line in answer_of(rows, 0.2) if line.startswith("WARNING")] == [
        "WARNING: rank 4 is slower than dense at batch 1; its time over that of dense: 2.00 at batch 1, 0.67 at batch "
        "32.",
        "WARNING: on held-out inputs, rank 4 loses 30%, more than 20%.",
    ]


def test_times_that_were_measured_beside_other_runs_are_marked():
    (row,) = rows_of({4: 0.0}, latency_ms_batch_1=0.05, dense_latency_ms_batch_1=0.1)
    assert (
        "Time of rank 4 over that of the dense weight here, measured while other runs were training (--jobs 1 avoids "
        "that): 0.50 at batch 1."
    ) in answer([row], Facts(disturbed=True))


def test_two_bounds_are_both_named():
    floors = RankFloors(make_weight(), ks.make_chain(64, 96, "butterfly"))
    lines = answer_of(rows_of({4: -1e-5}, floors), 0.9, floors)
    lower, upper = percents(floors.lower(4), floors.upper(4))
    assert f"No chain of rank 4 loses less than {lower}; the best known one loses {upper}." in lines


def test_without_results_or_floors_no_number_is_invented():
    assert answer_of([make_row(ending=Ending(Status.DIVERGED))], 0.1) == [
        "No rank has finished, so no rank can be named."
    ]
    assert answer_of([rows_of({4: 0.0})[0] | {"relative_loss": None}])[0].startswith("The criterion is not")
    none = RankFloors(make_weight(), ks.make_chain(64, 96, "lowrank_butterfly"))
    rows = [row | {"relative_floor_upper": None} for row in rows_of({4: 0.0})]
    assert "try a larger rank" in answer_of(rows, 0.01, none)[0]


@pytest.mark.parametrize(
    ("none_below", "reaching", "second"),
    [
        (4, 4, "No smaller rank can reach it."),
        (3, 4, "No rank below 3 can reach it; whether rank 3 can is not known."),
        (2, 4, "No rank below 2 can reach it; whether ranks 2 to 3 can is not known."),
        (1, 4, "Whether ranks 1 to 3 can reach it is not known."),
        (2, 9, "No rank below 2 can reach it; whether ranks 2 to 3 can is not known."),
        (3, 3, "Rank 3, which was not trained, can reach 10% too: the best known chain loses 9%."),
    ],
)
def test_what_smaller_ranks_can_do_comes_from_the_facts(none_below, reaching, second):
    facts = Facts(target=TargetRanks(0.1, none_below, reaching, 0.09, False))
    assert answer(rows_with({4: 0.08, 8: 0.02}), facts, 0.1)[1] == second


@pytest.mark.parametrize(("uncertified", "ranks"), [((4,), "rank 4"), ((4, 3), "ranks 3 and 4")])
def test_bounds_that_ran_out_of_time_are_reported(uncertified, ranks):
    lines = answer(rows_with({4: 0.08}), Facts(uncertified=uncertified, seconds=30.0), 0.1)
    assert f"The lower bound of {ranks} can be tighter, but not within 30 s: raise --tight_bounds." in lines


def test_the_bounds_that_the_answer_depends_on_are_those_of_few_ranks():
    floors = RankFloors(make_weight(), CHAIN, random_moment("regular", 96))
    floors = RankFloors(floors.weight / floors.curve[0].sqrt(), CHAIN, floors.metric)
    target = (floors.upper(5) + floors.upper(6)) / 2
    rows = rows_of({2: 0.01, 8: 0.001, 12: 0.0}, floors)
    assert named_row(rows, target)["rank"] == 8
    assert ranks_of_answer(rows, floors, target) == [8, 5]
    facts = find_facts(rows, floors, target, 30.0)
    assert facts.uncertified == (8, 5)
    floors.certify([5, 8], 1000.0)
    assert find_facts(rows, floors, target, 30.0).uncertified == ()
    assert ranks_of_answer(rows, floors, target) == ([8] if floors.lower(5) > target else [8, 5])


def test_the_note_on_a_target_has_one_rank_where_bounds_meet_and_two_where_they_do_not():
    assert target_note(TargetRanks(0.3, 4, 4, 0.29, True), True, Words()) == (
        "target 30% of the output energy, for isotropic inputs: rank 4 is the smallest that can reach it"
    )
    assert target_note(TargetRanks(0.3, 2, 4, 0.29, False), False, Words()) == (
        "target 30% of the output energy, for the measured inputs: rank 4 is the smallest whose best known chain "
        "reaches it; no rank below 2 can"
    )
