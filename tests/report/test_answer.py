"""The first sentence names a rank by the stated rules; remedies are those that would work."""

import torch
from study_rows import make_row

import ks
from ks.bounds.plan import make_plan
from ks.bounds.shares import shares
from ks.files.status import Ending, Status
from ks.report.answer import answer, knee

CHAIN = ks.make_chain(64, 96)


def make_weight(rows=64, cols=96):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, rows, generator=generator))[0] for size in (rows, cols))
    weight = (left * torch.arange(1, rows + 1) ** -1.0) @ right.T
    return (weight * (rows**0.5 / weight.norm())).double()


PLAN = make_plan(make_weight(), CHAIN)


def rows_of(excess, plan=PLAN, **changes):
    """Rows of trained ranks whose losses end this much above the upper bound."""
    rows = []
    for rank, above in excess.items():
        floor = plan.floors([rank])[0]
        upper = None if floor.exact else floor.upper
        row = make_row(floor.upper + above, floor.upper + above, floor.lower, upper, rank, chain=plan.chain)
        rows.append(row | changes)
    return rows


def test_the_smallest_rank_that_reached_the_target_is_named():
    curve = PLAN.curve
    rows = rows_of({2: 0.0, 4: 1e-4, 8: 0.0})
    first, second, *others = answer(rows, PLAN, curve[4].item() + 2e-4)
    assert first.startswith("Rank 4 is the smallest trained rank that loses at most ")
    assert f"it loses {shares(curve[4].item() + 1e-4)[0]}, with 41.67% of the parameters" in first
    assert second == "No smaller rank can reach it."
    assert any(line.startswith("A low-rank factorisation of the same size (rank 16) gets down to ") for line in others)


def test_a_smaller_rank_that_can_reach_the_target_is_named_too():
    target = PLAN.curve[3].item() + 1e-5
    assert answer(rows_of({2: 0.0, 4: 0.0}), PLAN, target)[1].startswith("Rank 3, which was not trained, can reach ")
    second = answer(rows_of({3: 1e-3, 4: 0.0}), PLAN, target)[1]
    assert second.startswith("Rank 3 can reach ")
    assert "but ends at " in second


def test_a_target_that_is_missed_by_a_little_needs_epochs_or_a_rank_with_room():
    floor = PLAN.curve[4].item()
    rows = rows_of({2: 0.0, 4: 0.008}, num_epochs=50)
    first = answer(rows, PLAN, floor + 0.004)[0]
    assert "is not reached: rank 4 ends at " in first
    assert "its floor is " in first
    assert "Use --num_epochs 100 or --ranks 5 (where " in first
    larger = int(first.split("--ranks ")[1].split(" ")[0])
    assert PLAN.curve[larger] + 0.008 <= floor + 0.004 < PLAN.curve[larger - 1] + 0.008


def test_a_floor_whose_bounds_differ_by_rounding_is_exact(monkeypatch):
    monkeypatch.setattr(PLAN.bounds, "upper", lambda rank: PLAN.bounds.lower(rank) * (1 + 5e-8))
    first, *others = answer(rows_of({4: 0.008}, num_epochs=50), PLAN, PLAN.curve[4].item() + 0.004)
    assert "its floor is " in first
    assert "best known" not in " ".join(others)


def test_at_least_twice_the_epochs_are_advised():
    rows = rows_of({4: 0.008}, num_epochs=50)
    assert "--num_epochs 100 " in answer(rows, PLAN, PLAN.curve[4].item() + 0.007)[0]
    assert "--num_epochs 400 " in answer(rows, PLAN, PLAN.curve[4].item() + 0.001)[0]


def test_epochs_are_not_advised_where_they_cannot_help():
    floor = PLAN.curve[4].item()
    far = answer(rows_of({4: 0.008}, num_epochs=50), PLAN, floor + 0.0001)[0]
    below = answer(rows_of({4: 0.008}, num_epochs=50), PLAN, floor - 0.001)[0]
    sampled = rows_of({4: 0.008}, num_epochs=50)[0]
    sampled = make_row(floor + 0.008, floor / 2, floor, rank=4, chain=CHAIN)
    limited = answer([sampled], PLAN, floor + 0.004)[0]
    for text in (far, below, limited):
        assert "--num_epochs" not in text
        assert "--ranks 5" in text
    assert "no rank below 5 can reach it" in below


def test_without_a_target_the_knee_is_named():
    losses = {1: 0.5, 2: 0.4, 4: 0.02, 8: 0.01}
    rows = [make_row(loss, loss, loss, rank=rank, chain=CHAIN) for rank, loss in losses.items()]
    assert knee(rows)["rank"] == 4
    assert answer(rows, PLAN)[0].startswith("Rank 4 is the knee of loss against parameters: it loses 2% of the output ")
    straight = [make_row(1 / rank, 1 / rank, 1 / rank, rank=rank, chain=CHAIN) for rank in (2, 4, 8)]
    assert knee(straight) is None
    first = answer(straight, PLAN)[0]
    assert first.startswith("Rank 8 loses least: it loses 12.50%")
    assert "no knee, so choose with --target_relative_loss" in first
    assert knee(rows[:2]) is None


def test_an_exact_rank_is_the_answer():
    rows = [make_row(loss, loss, 0.0, rank=rank, chain=CHAIN) for rank, loss in {2: 0.1, 4: 1e-9, 8: 1e-10}.items()]
    assert answer(rows, PLAN)[0].startswith("Rank 4 is the smallest trained rank that loses nothing")


def test_dominated_ranks_and_those_larger_than_dense_are_pointed_at():
    losses = {2: 0.2, 4: 0.3, 16: 0.1, 20: 0.1}
    rows = [make_row(loss, loss, loss, rank=rank, chain=CHAIN) for rank, loss in losses.items()]
    lines = answer(rows, PLAN, 0.15)
    assert lines[-1] == "Dominated, by a rank with no more parameters and no more loss: 4 by 2, 20 by 16."
    assert "WARNING: rank 16 has more parameters than the dense weight." in lines


def test_a_slower_chain_is_pointed_at():
    (row,) = rows_of({4: 0.0})
    row |= {"latency_ms_batch_1": 0.2, "dense_latency_ms_batch_1": 0.1}
    row |= {"latency_ms_batch_32": 0.2, "dense_latency_ms_batch_32": 0.3}
    (warning,) = [line for line in answer([row], PLAN) if line.startswith("WARNING")]
    assert warning == "WARNING: Time of rank 4 over that of the dense weight here: 2.00 at batch 1, 0.67 at batch 32."


def test_held_out_inputs_that_miss_the_target_are_pointed_at():
    rows = rows_of({4: 0.0}, held_out_relative_loss=0.3)
    assert any("on held-out inputs, rank 4 loses 30%, more than 20%" in line for line in answer(rows, PLAN, 0.2))


def test_two_bounds_are_both_named():
    plan = make_plan(make_weight(), ks.make_chain(64, 96, "butterfly"))
    rows = rows_of({4: -1e-5}, plan)
    lines = answer(rows, plan, 0.9)
    lower, upper = shares(plan.bounds.lower(4), plan.bounds.upper(4))
    assert f"No chain of rank 4 loses less than {lower}; the best known one loses {upper}." in lines


def test_without_results_or_floors_no_number_is_invented():
    assert answer([make_row(ending=Ending(Status.DIVERGED))], PLAN, 0.1) == [
        "No rank has finished, so no rank can be named."
    ]
    assert answer([rows_of({4: 0.0})[0] | {"relative_loss": None}], PLAN)[0].startswith("The criterion is not")
    none = make_plan(make_weight(), ks.make_chain(64, 96, "lowrank_butterfly"))
    rows = [row | {"relative_floor_upper": None} for row in rows_of({4: 0.0})]
    assert "try a larger rank" in answer(rows, none, 0.01)[0]
