"""The plan before any training against a search through every rank."""

import pytest
import torch
from chains import random_weight

import ks
from ks.bounds.floors import floor_curve, loss_floor
from ks.bounds.plan import make_plan
from ks.bounds.target_rank import ranks_around, smallest_ranks
from ks.moments.second_moment import SecondMoment

CHAINS = [ks.make_chain(24, 36), ks.make_chain(32, 48, "butterfly"), ks.make_chain(24, 36, "lowrank")]
TARGETS = [0.9, 0.5, 0.1, 1e-3]


def plan_of(chain, std=1.0):
    weight = random_weight(chain)
    return make_plan(weight * chain.rows**0.5 / (std * weight.norm()), chain, SecondMoment.isotropic(std))


@pytest.mark.parametrize("std", [1.0, 3.0])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.family)
def test_the_smallest_ranks_are_the_first_whose_bounds_reach_the_target(chain, std):
    plan = plan_of(chain, std)
    floors = plan.floors(list(range(1, chain.saturation_rank + 1)))
    assert floors == loss_floor(
        plan.weight, chain, range(1, chain.saturation_rank + 1), moment=SecondMoment.isotropic(std)
    )
    for target in TARGETS:
        lower, upper = smallest_ranks(plan, target)
        assert lower == min(floor.rank for floor in floors if floor.lower <= target)
        assert upper == min(floor.rank for floor in floors if floor.upper <= target)
        around = ranks_around(plan, target)
        assert {lower, upper} <= set(around)
        assert around == sorted(set(around))
        assert 1 <= around[0] <= around[-1] <= chain.saturation_rank


def test_an_exact_rank_is_the_smallest_one_although_its_bounds_differ_by_rounding(monkeypatch):
    plan = plan_of(CHAINS[0])
    monkeypatch.setattr(plan.bounds, "upper", lambda rank: plan.bounds.lower(rank) * (1 + 5e-8))
    assert smallest_ranks(plan, plan.curve[3].item() * (1 + 2e-8)) == (3, 3)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.family)
def test_a_plan_in_internal_units_does_not_depend_on_the_scale_of_the_inputs(chain):
    unit, scaled = plan_of(chain), plan_of(chain, 3.0)
    assert unit.moment.is_isotropic
    assert unit.curve[0] == pytest.approx(1.0)
    torch.testing.assert_close(scaled.curve, unit.curve)
    for (ours, curve), (theirs, other) in zip(scaled.family_curves(), unit.family_curves(), strict=True):
        assert ours == theirs
        torch.testing.assert_close(curve, other)


def test_low_rank_chains_are_shown_beside_the_family():
    plan = plan_of(CHAINS[0])
    (family, curve), (lowrank, tail) = plan.family_curves()
    assert (family, lowrank.family) == (CHAINS[0], "lowrank")
    assert torch.equal(curve, plan.curve)
    torch.testing.assert_close(tail, floor_curve(plan.weight, lowrank))
    assert [chain.family for chain, _ in plan_of(CHAINS[2]).family_curves()] == ["lowrank"]


def test_a_family_without_floors_has_a_reason():
    plan = plan_of(ks.make_chain(12, 20, "lowrank_butterfly"))
    assert plan.curve is None
    assert "chainable" in plan.reason
    assert plan.floors([1, 2]) == [None, None]
    assert plan.family_curves() == []
