"""Floors under a measured second moment against brute force, other solvers and other formulas."""

import math

import pytest
import torch
from chains import random_chain, random_weight
from measured import KINDS, random_moment, weighted_loss

import ks
from ks.bounds import frames
from ks.bounds.descent import refine_factors
from ks.bounds.factorize import factorize
from ks.bounds.floors import floor_curve, loss_floor
from ks.bounds.lift_and_shift import Lift, Part
from ks.bounds.lower_bound import CoupledLowerBound, isotropic_joint_bound
from ks.chain.patterns import Chain
from ks.chain.reference import chain_to_dense
from ks.errors import UsageError
from ks.moments.second_moment import SecondMoment


def energy_of(weight, moment):
    return weighted_loss(weight, torch.zeros_like(weight), moment)


# Every kind of moment with two factors, steep and block diagonal ones with three.
@pytest.mark.parametrize("seed", [1, 2, 3, 5, 6, 7, 11, 8, 12])
def test_no_chain_that_is_found_is_below_the_lower_bound(seed):
    """Random chains, ranks and moments; chains by descent over blocks and by descent over factors."""
    kind = KINDS[seed % len(KINDS)]
    chain = random_chain(seed, length=2 if seed % 4 else 3)
    weight = random_weight(chain, seed)
    moment = random_moment(kind, chain.cols, chain.block_shape(chain.num_splits)[2], seed)
    inputs, energy = SecondMoment(moment), energy_of(weight, moment)
    curve = floor_curve(weight, chain, inputs)
    assert curve[0] == pytest.approx(energy)
    for rank in (1, 2):
        (floor,) = loss_floor(weight, chain, [rank], inputs)
        values = factorize(weight, chain.patterns(rank), inputs)
        found = [weighted_loss(weight, chain_to_dense(values), moment)]
        assert found[0] == pytest.approx(floor.upper, abs=1e-9 * energy)
        generator = torch.Generator().manual_seed(seed)
        start = [torch.randn(*p, dtype=torch.float64, generator=generator) for p in chain.patterns(rank)]
        found.append(weighted_loss(weight, chain_to_dense(refine_factors(weight, moment, start)[0]), moment))
        assert curve[min(rank, chain.saturation_rank)] <= floor.lower + 1e-12 * energy
        assert 0 <= floor.lower <= floor.upper
        assert floor.lower <= min(found) + 1e-11 * energy
        if floor.exact:
            assert floor.lower == pytest.approx(floor.upper, abs=1e-9 * energy, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_search_of_the_whole_grid_of_rank_one_blocks_lies_between_the_bounds(seed):
    """Two 2 × 2 blocks of rank one, u(θ_i) v_iᵀ: for given angles the v_i are linear least squares; 90² pairs."""
    weight = random_weight(Chain("explicit", 2, 4, (2, 1), (2, 2)), seed)
    moment = random_moment(KINDS[seed % 3], 4, seed=seed)
    root = torch.linalg.cholesky(moment + 1e-15 * moment.trace() * torch.eye(4, dtype=torch.float64))
    angles = torch.arange(90, dtype=torch.float64) * math.pi / 90
    best = math.inf
    for first in angles:
        # vec of (Σ_i u_i v_iᵀ) F is linear in v; columns: the entries of v_1 and v_2
        basis = torch.zeros(90, 2, 4, 4, dtype=torch.float64)
        basis[:, 0, [0, 1], [0, 1]], basis[:, 1, [0, 1], [0, 1]] = first.cos(), first.sin()
        basis[:, 0, [2, 3], [2, 3]], basis[:, 1, [2, 3], [2, 3]] = angles.cos()[:, None], angles.sin()[:, None]
        columns = torch.einsum("tmjc,jk->tmkc", basis, root)
        orthonormal = torch.linalg.qr(columns.reshape(90, 8, 4))[0]
        target = (weight @ root).reshape(8)
        best = min(best, (target.square().sum() - (target @ orthonormal).square().sum(-1)).min().item() / 2)
    (floor,) = loss_floor(weight, Chain("explicit", 2, 4, (2, 1), (2, 2)), [1], moment)
    energy = energy_of(weight, moment)
    assert floor.lower <= best + 1e-9 * energy
    assert floor.upper <= 1.02 * best + 1e-5 * energy


def test_a_second_moment_may_be_a_tensor_or_an_object():
    weight, moment = random_weight(ks.make_chain(12, 20)), random_moment("regular", 20)
    chain = ks.make_chain(12, 20)
    given = ks.loss_floor(weight, chain, [1, 2], metric=moment)
    assert given == ks.loss_floor(weight, chain, [1, 2], metric=SecondMoment(moment))
    assert given != ks.loss_floor(weight, chain, [1, 2])
    with pytest.raises(UsageError, match="19 features"):
        ks.loss_floor(weight, chain, [1], metric=moment[1:, 1:])


@pytest.mark.parametrize("family", ["monarch", "lowrank", "butterfly"])
def test_a_moment_of_identity_has_the_floors_of_isotropic_inputs(family):
    """And both are the floors of unit inputs times their energy."""
    chain = ks.make_chain(24, 36, family)
    weight, ranks = random_weight(chain), [1, 2, 3, 50]
    unit_curve, units = floor_curve(weight, chain), loss_floor(weight, chain, ranks)
    rounding = 1e-13 * unit_curve[0].item()  # of a bound that is zero
    for inputs in (9 * torch.eye(36, dtype=torch.float64), SecondMoment.isotropic(3.0)):
        torch.testing.assert_close(floor_curve(weight, chain, inputs), 9 * unit_curve, rtol=1e-12, atol=rounding)
        for ours, unit in zip(loss_floor(weight, chain, ranks, inputs), units, strict=True):
            assert (ours.rank, ours.exact) == (unit.rank, unit.exact)
            assert ours.lower == pytest.approx(9 * unit.lower, rel=1e-9, abs=9 * rounding)
            assert ours.upper == pytest.approx(9 * unit.upper, rel=1e-9, abs=9 * rounding)


def test_the_general_bounds_are_exact_where_groups_are_not_coupled():
    """Up to a coupling of 1e-13, which sends the same moment through descent and certificates."""
    chain = ks.make_chain(24, 36)
    weight = random_weight(chain)
    moment = random_moment("block diagonal", 36, groups=4)
    exact = loss_floor(weight, chain, [1, 3], SecondMoment(moment))
    moment[0, 35] = moment[35, 0] = 1e-13 * moment.abs().max()
    for ours, theirs in zip(loss_floor(weight, chain, [1, 3], SecondMoment(moment)), exact, strict=True):
        assert ours.upper == pytest.approx(theirs.upper, rel=1e-9)
        assert ours.lower == pytest.approx(theirs.lower, rel=2e-3)
    assert all(floor.exact for floor in exact)


@pytest.mark.parametrize("kind", ["steep", "singular"])
def test_chains_with_one_column_group_are_exact(kind):
    chain = Chain("explicit", 12, 20, (4, 3), (1, 20))
    weight, moment = random_weight(chain), random_moment(kind, 20)
    for floor in loss_floor(weight, chain, [1, 2, 3], SecondMoment(moment)):
        assert floor.exact
        values = factorize(weight, chain.patterns(floor.rank), moment)
        loss = weighted_loss(weight, chain_to_dense(values), moment)
        assert loss == pytest.approx(floor.upper, abs=1e-12 * energy_of(weight, moment))


@pytest.mark.parametrize("kind", ["steep", "singular"])
def test_a_tight_bound_is_above_a_quick_one_and_below_the_upper_one(kind):
    chain = ks.make_chain(24, 36)
    weight, inputs = random_weight(chain), random_moment(kind, 36)
    quick, tight = (loss_floor(weight, chain, [2], inputs, tight=tight)[0] for tight in (False, True))
    assert floor_curve(weight, chain, inputs)[2] <= quick.lower <= tight.lower <= tight.upper == quick.upper


@pytest.mark.parametrize(("length", "tight"), [(2, False), (2, True), (3, False)])
def test_a_bound_that_is_stopped_at_any_moment_is_valid(length, tight):
    """The descent of one rank lower is above it; a bound for more steps is no worse."""
    chain = random_chain(3, length=length)
    weight, moment = random_weight(chain, 3), random_moment("steep", chain.cols, seed=3)
    loss = loss_floor(weight, chain, [1], moment)[0].upper * len(weight)
    lower, found = CoupledLowerBound(weight, chain, moment), []
    for steps in (0, 1, 2, 5, 11, 40, 10_000):
        countdown = iter(range(steps))
        found.append(lower(1, tight, lambda countdown=countdown: next(countdown, None) is None))
    assert lower.simple[1].item() == found[0] < found[-1] <= loss
    assert max(found) <= loss
    assert found[-1] == lower(1, tight)


def test_progress_is_reported_before_each_long_computation():
    chain = ks.make_chain(12, 20)
    reported = []
    loss_floor(random_weight(chain), chain, [2], SecondMoment(random_moment("regular", 20)), progress=reported.append)
    assert {"upper bound of rank 2", "lower bound of rank 2"} <= {*reported}


@pytest.mark.parametrize("kind", ["regular", "singular", "low energy feature"])
def test_a_certificate_is_the_formula_of_its_theorem(kind):
    """Evaluated by SVDs, for an arbitrary shift."""
    weight, moment = random_weight(ks.make_chain(12, 20)), random_moment(kind, 20)
    factor = frames.factor_of(moment)
    torch.testing.assert_close(factor @ factor.mT, moment)
    own, rest = frames.fair_splitting(factor, 2).parts()
    parts = [Part(frame, 1, 3) for frame in own if frame.shape[1]]
    stacked = torch.cat([*(part.frame for part in parts), rest], 1)
    torch.testing.assert_close(stacked @ stacked.mT, torch.eye(len(stacked), dtype=torch.float64))
    for i, part in enumerate(parts):
        leak = factor @ part.frame
        leak[10 * i : 10 * i + 10] = 0
        assert leak.norm() <= 1e-9 * factor.norm()
    parts.append(Part(rest, 2, 3))
    target, gram = weight @ factor @ stacked, stacked.mT @ stacked
    generator = torch.Generator().manual_seed(0)
    shift = 0.1 * torch.randn(target.shape, dtype=torch.float64, generator=generator)
    outside = shift - shift @ gram
    assert (outside @ stacked.mT).norm() <= 1e-12 * outside.norm()
    expected, start = -outside.square().sum(), 0
    for part in parts:
        moved = (target - outside)[:, start : start + part.frame.shape[1]]
        start += part.frame.shape[1]
        expected += sum(torch.linalg.svdvals(moved[t::3])[part.size :].square().sum() for t in range(3))
    bound = Lift(parts).bound(target, 1, shift)
    assert bound == pytest.approx(expected.item(), rel=1e-9)
    chain = Chain("explicit", 12, 20, (4, 3), (2, 10))
    assert bound <= len(weight) * loss_floor(weight, chain, [1], SecondMoment(moment))[0].upper


@pytest.mark.parametrize("seed", range(2))
def test_the_ranks_of_all_splits_bind_together(seed):
    """On random weights, a chain of four factors is farther from its floor by single splits."""
    chain = ks.make_chain(32, 32, "butterfly", num_factors=4)
    weight = random_weight(chain, seed)
    joint, curve = isotropic_joint_bound(weight, chain, 2) / 32, floor_curve(weight, chain)[2].item()
    (floor,) = loss_floor(weight, chain, [2])
    assert 1.01 * curve < joint == floor.lower < floor.upper
    moment = torch.eye(32, dtype=torch.float64)
    values, _ = refine_factors(weight, moment, factorize(weight, chain.patterns(2)), 500, 1e-7)
    assert floor.lower < weighted_loss(weight, chain_to_dense(values), moment)
