"""Bounds under metrics that couple rows and columns against brute force, other solvers and their formula."""

import math

import pytest
import torch
from chains import random_chain, random_weight
from measured import KINDS, random_moment

import ks
from ks.bounds import frames
from ks.bounds.descent import GridDescent, refine_factors
from ks.bounds.lift_and_shift import Lift, Part
from ks.bounds.lower_bound import CoupledLowerBound
from ks.chain.patterns import Chain
from ks.moments.metric import Metric


def grid_chain(rows, cols, row_groups, column_groups):
    return Chain("explicit", rows, cols, (rows // row_groups, row_groups), (column_groups, cols // column_groups))


def dense_grid(left, right):
    q, p, height, _ = left.shape
    return (left @ right.mT).permute(2, 0, 1, 3).reshape(q * height, -1)


def upper_bound(weight, metric, row_groups, column_groups, rank):
    factors = GridDescent(weight, metric, row_groups, column_groups).factors(rank)
    return metric.loss(weight - dense_grid(*factors))


def least_by_lbfgs(weight, metric, row_groups, column_groups, rank, starts):
    """Return the least loss that L-BFGS finds over the factors of the blocks."""
    roots = metric.outputs._root, metric.inputs._root
    height, width = weight.shape[0] // row_groups, weight.shape[1] // column_groups
    found = []
    for seed in range(starts):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(row_groups, column_groups, size, rank) for size in (height, width)]
        factors = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
        solver = torch.optim.LBFGS(factors, max_iter=100, history_size=20, line_search_fn="strong_wolfe")

        def loss(solver=solver, factors=factors):
            solver.zero_grad()
            value = (roots[0] @ (weight - dense_grid(*factors)) @ roots[1]).square().sum()
            value.backward()
            return value

        solver.step(loss)
        found.append(metric.loss(weight - dense_grid(*factors).detach()))
    return min(found)


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_no_grid_that_is_found_is_below_the_lower_bound(seed):
    """G and C of all kinds, the ranks that bind, and those that bind only some of the remainders."""
    kinds = KINDS[seed], KINDS[(2 * seed + 1) % len(KINDS)]
    weight = random_weight(ks.make_chain(12, 18), seed)
    metric = Metric(random_moment(kinds[0], 18, 3, seed), random_moment(kinds[1], 12, 2, seed), (0.1, 0.0)[seed % 2])
    lower, energy = CoupledLowerBound(weight, grid_chain(12, 18, 2, 3), metric), metric.loss(weight)
    assert lower.simple[0] == pytest.approx(energy)
    for rank in (1, 2, 4):
        upper = upper_bound(weight, metric, 2, 3, rank)
        assert 0 <= lower.simple[rank] <= lower(rank) <= upper + 1e-11 * energy
    found = least_by_lbfgs(weight, metric, 2, 3, 1, starts=2)
    assert lower(1) <= found + 1e-11 * energy
    assert upper_bound(weight, metric, 2, 3, 1) <= 1.1 * found + 1e-6 * energy  # so small a grid has many local optima


@pytest.mark.parametrize("seed", range(4))
def test_a_search_of_all_grids_of_two_by_two_blocks_of_rank_one_lies_between_the_bounds(seed):
    """Four blocks u(θ_ti) v_tiᵀ: for given angles the v_ti are linear least squares; 18 angles each."""
    weight = random_weight(ks.make_chain(4, 4), seed)
    metric = Metric(random_moment(KINDS[seed % 2], 4, seed=seed), random_moment("regular", 4, seed=seed + 1), 0.1)
    roots = metric.outputs._root, metric.inputs._root
    angles = torch.arange(18, dtype=torch.float64) * math.pi / 18
    directions = torch.stack([angles.cos(), angles.sin()], 1)
    # The column of entry c of v_ti is vec(G^{1/2}[:, t::2] u ⊗ C^{1/2}[2 i + c]).
    bases = [
        torch.einsum("au,mu,ck->amkc", directions, roots[0][:, t::2], roots[1][2 * i : 2 * i + 2]).reshape(18, 16, 2)
        for t in range(2)
        for i in range(2)
    ]
    target = (roots[0] @ weight @ roots[1]).flatten()
    best = math.inf
    for first in bases[0]:
        grids = torch.stack(torch.meshgrid(*[torch.arange(18)] * 3, indexing="ij"), -1).reshape(-1, 3)
        others = [basis[grids[:, j]] for j, basis in enumerate(bases[1:])]
        columns = torch.linalg.qr(torch.cat([first.expand(len(grids), -1, -1), *others], -1))[0]
        best = min(best, (target.square().sum() - (target @ columns).square().sum(-1)).min().item())
    lower, energy = CoupledLowerBound(weight, grid_chain(4, 4, 2, 2), metric)(1), metric.loss(weight)
    assert 0.5 * best - 1e-5 * energy <= lower <= best + 1e-9 * energy
    assert upper_bound(weight, metric, 2, 2, 1) <= 1.02 * best + 1e-5 * energy


@pytest.mark.parametrize("seed", range(4))
def test_no_deeper_chain_that_is_found_is_below_the_lower_bound(seed):
    chain = random_chain(seed, length=3)
    weight = random_weight(chain, seed)
    metric = Metric(random_moment("steep", chain.cols, seed=seed), random_moment("regular", chain.rows, seed=seed))
    lower, energy = CoupledLowerBound(weight, chain, metric), metric.loss(weight)
    generator = torch.Generator().manual_seed(seed)
    for rank in (1, 2):
        start = [torch.randn(*p, dtype=torch.float64, generator=generator) for p in chain.patterns(rank)]
        assert lower(rank) <= refine_factors(weight, metric, start, 30)[1][-1] + 1e-11 * energy
    for tight in (False, True):
        assert lower.simple[1] <= lower(1, tight) + 1e-12 * energy


@pytest.mark.parametrize("power", [1, 2])
def test_the_certificate_is_close_where_both_spectra_are_steep(power):
    """Of grids of 16 × 24; more than the simple bound, which is at most three quarters of the loss of the descent."""
    generator = torch.Generator().manual_seed(power)
    weight = torch.randn(16, 24, dtype=torch.float64, generator=generator)
    moments = []
    for size in (24, 16):
        basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
        moments.append((basis * torch.arange(1, size + 1, dtype=torch.float64) ** -power) @ basis.mT)
    metric = Metric(*moments)
    lower, upper = CoupledLowerBound(weight, grid_chain(16, 24, 2, 2), metric), upper_bound(weight, metric, 2, 2, 2)
    assert lower.simple[2] < 0.75 * upper
    assert 0.8 * upper < lower(2) <= upper


def test_a_g_that_couples_no_row_groups_has_the_bounds_of_the_weighted_weight():
    order = torch.arange(12).view(2, 6).t().flatten()  # contiguous groups become the row groups t::2
    gradients = random_moment("block diagonal", 12, groups=2)[order][:, order]
    weight, moment = random_weight(ks.make_chain(12, 18)), random_moment("regular", 18)
    chain, metric = grid_chain(12, 18, 2, 3), Metric(moment, gradients)
    ours, theirs = CoupledLowerBound(weight, chain, metric), CoupledLowerBound(metric.weighted(weight), chain, moment)
    torch.testing.assert_close(ours.simple, theirs.simple, rtol=0, atol=1e-9 * metric.loss(weight))
    assert ours(1) == pytest.approx(theirs(1), rel=1e-6)


@pytest.mark.parametrize("kind", ["regular", "singular"])
def test_a_certificate_is_the_formula_of_its_theorem(kind):
    """Evaluated by SVDs, for an arbitrary shift, with the ranks r, p r, q r and p q r of the blocks; q = 3, p = 2."""
    weight = random_weight(ks.make_chain(12, 20))
    metric = Metric(random_moment(kind, 20), random_moment(kind, 12, seed=1), damping=0)
    sides, ranks = [], []
    for moment, groups in ((metric.rows_in_groups(3).matrix, 3), (metric.inputs.matrix, 2)):
        factor = frames.factor_of(moment)
        torch.testing.assert_close(factor @ factor.mT, moment)
        parts = [part for part in frames.fair_splitting(factor, groups).parts() if part.shape[1]]
        sides.append((factor, [*parts, frames.remainder(parts, factor)]))
        ranks.append([1] * len(parts) + [groups])
    (row_factor, left), (factor, right) = sides
    lifted = row_factor.mT @ torch.cat([weight[t::3] for t in range(3)]) @ factor
    lift = Lift(
        [Part(frame, size) for frame, size in zip(right, ranks[1])],
        [Part(frame, size) for frame, size in zip(left, ranks[0])],
    )
    target, (gram, row_gram) = lift(lifted), lift.grams
    torch.testing.assert_close(target, torch.cat(left, 1).mT @ lifted @ torch.cat(right, 1))
    generator = torch.Generator().manual_seed(0)
    shift = 0.1 * torch.randn(target.shape, dtype=torch.float64, generator=generator)
    outside = shift - row_gram @ shift @ gram
    expected = -(shift * outside).sum()
    bands = (target - outside).split([frame.shape[1] for frame in left])
    for band, row_rank in zip(bands, ranks[0]):
        for block, rank in zip(band.split([frame.shape[1] for frame in right], 1), ranks[1]):
            expected += torch.linalg.svdvals(block)[row_rank * rank :].square().sum()
    assert lift.bound(target, 1, shift) == pytest.approx(expected.item(), rel=1e-9)
    assert lift.bound(target, 1, shift) <= upper_bound(weight, metric, 3, 2, 1)
