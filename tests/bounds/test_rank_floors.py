"""Floors of every rank: cheap bounds first, certified ones on request, all kept; against a search of all ranks."""

import itertools

import pytest
import torch
from chains import random_weight
from measured import random_moment

import ks
from ks.bounds import rank_floors
from ks.bounds.floors import Floor, floor_curve, loss_floor
from ks.bounds.floors_file import FloorsFile
from ks.bounds.rank_floors import KnownBounds, RankFloors
from ks.moments.second_moment import SecondMoment


def floors_of(family="monarch", measured=True, rows=24, cols=36, **options):
    """Floors in units in which the zero predictor loses 1."""
    chain = ks.make_chain(rows, cols, family)
    moment = SecondMoment(random_moment("regular", cols)) if measured else SecondMoment.isotropic(3.0)
    weight = random_weight(chain)
    return RankFloors(weight * (rows / moment.output_energy(weight)) ** 0.5, chain, moment, **options)


@pytest.mark.parametrize(
    ("family", "measured"), [("monarch", False), ("monarch", True), ("butterfly", False), ("lowrank", True)]
)
def test_certified_floors_are_those_of_loss_floor_and_target_ranks_follow_them(family, measured):
    floors = floors_of(family, measured)
    assert floors.curve[0] == pytest.approx(1.0)
    ranks = range(1, floors.chain.saturation_rank + 1)
    before = floors.floors(ranks)
    floors.certify(ranks, 1000)
    certified = floors.floors(ranks)
    for rank, expected in zip(ranks, loss_floor(floors.weight, floors.chain, ranks, floors.metric), strict=True):
        assert before[rank].lower <= expected.lower <= certified[rank].lower <= certified[rank].upper
        assert certified[rank].upper == expected.upper
    for target in (0.9, 0.5, 0.1, 1e-3):
        found = floors.target_ranks(target)
        assert found.none_below == min(rank for rank in ranks if certified[rank].lower <= target)
        assert found.reaching == min(rank for rank in ranks if certified[rank].upper <= target)
        assert found.loss == pytest.approx(certified[found.reaching].upper)
        around = floors.ranks_around(target)
        assert {found.none_below, found.reaching} <= {*around}
        assert around == sorted({*around})
        assert 1 <= around[0] <= around[-1] <= floors.chain.saturation_rank


def test_a_target_rank_takes_few_descents():
    floors = floors_of(rows=128, cols=192)
    found = floors.target_ranks(0.2)
    assert 4 < found.reaching < floors.chain.saturation_rank
    assert len(floors.known.upper) <= 5
    assert floors.upper(found.reaching) <= 0.2 < floors.upper(found.reaching - 1)


def test_an_exact_rank_is_the_smallest_one_although_its_bounds_differ_by_rounding():
    floors = floors_of(measured=True)
    lower = floors.curve[3].item()
    floors.known.upper = {rank: floors.curve[rank].item() * (1 + 5e-8) for rank in range(1, 6)}
    found = floors.target_ranks(lower * (1 + 2e-8))
    assert (found.none_below, found.reaching, found.exact) == (3, 3, True)


def test_certified_bounds_rise_within_their_seconds_and_never_fall(monkeypatch):
    floors = floors_of()
    simple = floors.floor(3).lower
    floors.certify([3], 0.0)
    assert floors.floor(3).lower == simple
    assert floors.uncertified([3, 2, 100]) == [3, 2]  # saturation is exact
    clock = itertools.count()
    monkeypatch.setattr(rank_floors.time, "monotonic", lambda: next(clock))
    floors.certify([3], 5.0)
    stopped = floors.known.certified[3]
    assert floors.lower(2) >= stopped.lower  # the bound of a larger rank holds for a smaller one
    assert (stopped.passes, stopped.seconds) == (0, 5.0)
    assert simple <= floors.floor(3).lower == stopped.lower
    floors.certify([3], 5.0)
    assert next(clock) < 20
    assert floors.known.certified[3] is stopped  # it is tried again only with more time
    monkeypatch.undo()
    floors.certify([3, 2], 1000.0)
    assert stopped.lower < floors.floor(3).lower
    assert floors.uncertified([3, 2]) == []
    once = floors.floor(3).lower
    floors.certify([3], 1000.0, tight=True)
    assert floors.floor(3).lower > once
    monkeypatch.setattr(floors, "_bounds", None)
    floors.certify([3, 2], 1000.0)  # nothing is left to do
    monkeypatch.undo()
    before = dict(floors.known.certified)
    floors.certify([1], 1000.0, stop=lambda: True)
    assert floors.known.certified == before


def answers_of(floors):
    return floors.floors([2, 5]), floors.lowrank_beside(100), floors.target_ranks(0.3), floors.isotropic_curve.tolist()


@pytest.mark.parametrize("measured", [False, True])
def test_bounds_from_a_file_answer_without_computing(tmp_path, measured, monkeypatch):
    floors = floors_of(measured=measured)
    floors.isotropic_weight = lambda: floors.weight
    floors.certify([2], 1000.0)
    answers = answers_of(floors)
    file = FloorsFile(tmp_path / "bounds.npz")
    file.add_bounds("w", "x", floors.chain, floors.known)
    file.save()
    stored = FloorsFile(tmp_path / "bounds.npz")
    for other in (("v", "x", floors.chain), ("w", None, floors.chain), ("w", "x", ks.make_chain(24, 36, blocks=2))):
        assert stored.find_bounds(*other) == KnownBounds()
    known = stored.find_bounds("w", "x", floors.chain)
    again = RankFloors(floors.weight, floors.chain, floors.metric, known=known)
    for name in ("chain_bounds", "floor_curve", "low_rank_energies"):
        monkeypatch.delattr(rank_floors, name)
    assert answers_of(again) == answers
    again.certify([2], 1000.0)
    unchanged = (tmp_path / "bounds.npz").stat().st_mtime_ns
    stored.add_bounds("w", "x", floors.chain, again.known)
    stored.save()
    assert (tmp_path / "bounds.npz").stat().st_mtime_ns == unchanged


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("curve", torch.zeros(3)),
        ("curve", torch.full((7,), torch.nan, dtype=torch.float64)),
        ("lowrank", -torch.ones(25, dtype=torch.float64)),
        ("upper", {2.5: 0.1}),
        ("upper", {99: 0.1}),
        ("upper", {2: float("nan")}),
    ],
)
def test_bounds_that_cannot_be_are_not_believed(tmp_path, part, broken):
    chain, file = ks.make_chain(24, 36), FloorsFile(tmp_path / "bounds.npz")
    file.add_bounds("w", None, chain, KnownBounds(**{"upper": {1: 0.5}} | {part: broken}))
    file.save()
    assert FloorsFile(tmp_path / "bounds.npz").find_bounds("w", None, chain) == KnownBounds()


def test_low_rank_chains_are_shown_beside_the_family():
    floors = floors_of()
    (family, curve), (lowrank, tail) = floors.family_curves()
    assert (family, lowrank.family) == (floors.chain, "lowrank")
    assert torch.equal(curve, floors.curve)
    torch.testing.assert_close(tail, floor_curve(floors.weight, lowrank, floors.metric))
    assert floors.lowrank_beside(floors.chain.parameters(2)) == (8, tail[8].item())
    assert [chain.family for chain, _ in floors_of("lowrank").family_curves()] == ["lowrank"]


def test_a_family_without_floors_has_a_reason():
    floors = floors_of("lowrank_butterfly")
    assert "chainable" in floors.reason
    assert floors.floors([1, 2]) == {1: None, 2: None}
    assert floors.family_curves() == floors.uncertified([1]) == []
    assert not floors_of(reason="another criterion").has_floors


def test_a_floor_is_exact_up_to_rounding():
    assert Floor.between(2, 0.5, 0.5 * (1 + 1e-7), 1.0).exact
    assert Floor.between(2, 0.0, 1e-15, 1.0).exact
    assert Floor.between(2, 0.5 * (1 + 1e-9), 0.5, 1.0).lower == 0.5
    assert not Floor.between(2, 0.5, 0.5001, 1.0).exact
