"""Floors under a measured second moment against brute force, other solvers, other formulas, and planted faults."""

import math

import pytest
import torch
from chains import random_chain, random_weight
from measured import KINDS, random_moment, weighted_loss

import ks
from ks.bounds import frames, lower_bound
from ks.bounds.descent import refine_factors
from ks.bounds.factorize import factorize
from ks.bounds.floors import floor_curve, loss_floor
from ks.bounds.lift_and_shift import Part, bound_of_shift
from ks.bounds.lower_bound import CoupledLowerBound, isotropic_joint_bound
from ks.chain.patterns import Chain
from ks.chain.reference import chain_to_dense
from ks.errors import UsageError
from ks.moments.second_moment import SecondMoment


def energy_of(weight, moment):
    return weighted_loss(weight, torch.zeros_like(weight), moment)


@pytest.mark.parametrize("seed", range(21))
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


@pytest.mark.parametrize("seed", range(12))
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


@pytest.mark.parametrize("seed", range(6))
def test_a_quasi_newton_method_reaches_nothing_below_the_bounds(seed):
    chain = random_chain(seed, length=2 + seed % 2)
    weight, moment = random_weight(chain, seed), random_moment("regular", chain.cols, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    patterns = chain.patterns(1)
    values = [torch.randn(*p, dtype=torch.float64, generator=generator).requires_grad_() for p in patterns]
    optimizer = torch.optim.LBFGS(values, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        error = weight - ks.chain_product(torch.eye(chain.cols, dtype=torch.float64), values, batch_last=True)
        loss = ((error @ moment) * error).sum() / len(weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    (floor,) = loss_floor(weight, chain, [1], SecondMoment(moment))
    assert floor.lower <= closure().item()
    assert floor.lower > 0.02 * closure().item() or chain.saturation_rank == 1


def test_a_second_moment_may_be_a_tensor_or_an_object():
    weight, moment = random_weight(ks.make_chain(12, 20)), random_moment("regular", 20)
    chain = ks.make_chain(12, 20)
    given = ks.loss_floor(weight, chain, [1, 2], moment=moment)
    assert given == ks.loss_floor(weight, chain, [1, 2], moment=SecondMoment(moment))
    assert given != ks.loss_floor(weight, chain, [1, 2])
    with pytest.raises(UsageError, match="19 features"):
        ks.loss_floor(weight, chain, [1], moment=moment[1:, 1:])


@pytest.mark.parametrize("family", ["monarch", "lowrank", "butterfly"])
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_a_moment_of_identity_has_the_floors_of_isotropic_inputs(family, std):
    chain = ks.make_chain(24, 36, family)
    weight, ranks = random_weight(chain), [1, 2, 3, 50]
    measured = SecondMoment(std**2 * torch.eye(36, dtype=torch.float64))
    curve, expected = (floor_curve(weight, chain, inputs) for inputs in (measured, SecondMoment.isotropic(std)))
    torch.testing.assert_close(curve, expected, rtol=1e-12, atol=1e-14 * expected[0].item())
    for ours, isotropic in zip(
        loss_floor(weight, chain, ranks, measured),
        loss_floor(weight, chain, ranks, SecondMoment.isotropic(std)),
        strict=True,
    ):
        assert (ours.rank, ours.exact) == (isotropic.rank, isotropic.exact)
        for name in ("lower", "upper"):
            expected_bound = getattr(isotropic, name)
            assert getattr(ours, name) == pytest.approx(expected_bound, rel=1e-12, abs=1e-13 * expected[0].item())


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


def test_low_rank_floors_are_those_of_svd_llm():
    """With a Cholesky factor of C in the place of its root. Source: Wang et al., "SVD-LLM" (2024)."""
    weight, moment = random_weight(ks.make_chain(20, 30)), random_moment("regular", 30)
    energies = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment)).square() / 20
    curve = floor_curve(weight, ks.make_chain(20, 30, "lowrank"), SecondMoment(moment))
    expected = torch.stack([energies[rank:].sum() for rank in range(21)])
    torch.testing.assert_close(curve, expected, rtol=1e-10, atol=1e-14 * expected[0].item())


@pytest.mark.parametrize("kind", KINDS)
def test_chains_with_one_column_group_are_exact(kind):
    chain = Chain("explicit", 12, 20, (4, 3), (1, 20))
    weight, moment = random_weight(chain), random_moment(kind, 20)
    for floor in loss_floor(weight, chain, [1, 2, 3], SecondMoment(moment)):
        assert floor.exact
        values = factorize(weight, chain.patterns(floor.rank), moment)
        loss = weighted_loss(weight, chain_to_dense(values), moment)
        assert loss == pytest.approx(floor.upper, abs=1e-12 * energy_of(weight, moment))


def test_losses_are_means_over_samples():
    chain = ks.make_chain(12, 20)
    weight, inputs = random_weight(chain), SecondMoment(random_moment("steep", 20))
    (floor,) = loss_floor(weight, chain, [2], inputs)
    x = inputs.transform(torch.randn(200_000, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    error = weight - chain_to_dense(factorize(weight, chain.patterns(2), inputs))
    losses = (x @ error.t()).square().mean(1)
    assert abs(losses.mean().item() - floor.upper) < 4 * losses.std().item() / len(x) ** 0.5


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("kind", ["regular", "steep", "singular"])
def test_better_bounds_are_between_the_simple_ones_and_the_upper_ones(kind, tight):
    chain = ks.make_chain(24, 36)
    weight, inputs = random_weight(chain), SecondMoment(random_moment(kind, 36))
    curve = floor_curve(weight, chain, inputs)
    for floor in loss_floor(weight, chain, [1, 3], inputs, tight=tight):
        assert curve[floor.rank] <= floor.lower <= floor.upper
    quick, slow = (loss_floor(weight, chain, [2], inputs, tight=tight)[0] for tight in (False, True))
    assert slow.lower >= quick.lower * (1 - 1e-3)
    assert slow.upper == quick.upper


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("tight", [False, True])
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


def test_progress_is_told_before_each_long_computation():
    chain = ks.make_chain(12, 20)
    told = []
    loss_floor(random_weight(chain), chain, [2], SecondMoment(random_moment("regular", 20)), progress=told.append)
    assert any("upper bound of rank 2" in text for text in told)
    assert any("lower bound of rank 2" in text for text in told)


@pytest.mark.parametrize("kind", ["regular", "singular", "low energy feature"])
def test_a_certificate_is_the_formula_of_its_theorem(kind):
    """Evaluated by SVDs, for an arbitrary shift."""
    weight, moment = random_weight(ks.make_chain(12, 20)), random_moment(kind, 20)
    factor = frames.factor_of(moment)
    torch.testing.assert_close(factor @ factor.mT, moment)
    parts = [Part(frame, 1, 3) for frame in frames.fair_splitting(factor, 2).parts() if frame.shape[1]]
    rest = frames.remainder([part.frame for part in parts], factor)
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
    bound = bound_of_shift(target, gram, parts, 1, shift)
    assert bound == pytest.approx(expected.item(), rel=1e-9)
    chain = Chain("explicit", 12, 20, (4, 3), (2, 10))
    assert bound <= len(weight) * loss_floor(weight, chain, [1], SecondMoment(moment))[0].upper


def transposed(original):
    return lambda moment: original(moment).mT.contiguous()


def two_factors():
    for seed in range(8):
        chain = Chain("explicit", 12, 12, (4, 3), (3, 4))
        yield chain, random_weight(chain, seed), random_moment("steep", 12, seed=seed)


def crossed():
    """Whether any lower bound is above the loss of a chain."""
    for chain, weight, moment in two_factors():
        lower = CoupledLowerBound(weight, chain, moment)
        for rank in (1, 2):
            values = factorize(weight, chain.patterns(rank), moment)
            loss = weighted_loss(weight, chain_to_dense(values), moment)
            if max(lower(rank), lower.simple[rank].item()) > len(weight) * loss:
                return True
    return False


@pytest.mark.parametrize("fault", ["none", "transposed root", "large parts", "a rank too low"])
def test_planted_faults_cross_the_floor(fault, monkeypatch):
    if fault == "transposed root":
        monkeypatch.setattr(lower_bound, "factor_of", transposed(frames.factor_of))
    if fault == "large parts":
        admissible = frames.Splitting.parts
        monkeypatch.setattr(frames.Splitting, "parts", lambda self: [1.5 * part for part in admissible(self)])
        monkeypatch.setattr(lower_bound, "remainder", lambda parts, factor: torch.eye(factor.shape[1]).double())
    if fault == "a rank too low":
        original_bound = lower_bound.lift_and_shift
        monkeypatch.setattr(
            lower_bound,
            "lift_and_shift",
            lambda lifted, parts, rank, *rest, **named: original_bound(lifted, parts, rank - 1, *rest, **named),
        )
    assert crossed() is (fault != "none")


@pytest.mark.parametrize("seed", range(6))
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
