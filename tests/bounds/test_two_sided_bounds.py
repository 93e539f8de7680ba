"""Bounds under metrics that couple rows and columns against brute force, other solvers and their formula."""

import math

import pytest
import torch
from chains import loss, random_weight, trained
from measured import KINDS, random_moment

import ks
from ks.bounds import frames
from ks.bounds.factorize import factorize
from ks.bounds.lift_and_shift import Lift, Part
from ks.bounds.lower_bound import CoupledLowerBound
from ks.chain.patterns import Chain
from ks.moments.metric import Metric


def grid_chain(rows, cols, row_groups, column_groups):
    return Chain("explicit", rows, cols, (rows // row_groups, row_groups), (column_groups, cols // column_groups))


def upper_bound(weight, metric, chain, rank):
    return len(weight) * loss(weight, factorize(weight, chain.patterns(rank), metric), metric)


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_no_grid_that_is_found_is_below_the_lower_bound(seed):
    """G and C of all kinds, the ranks that bind, and those that bind only some of the remainders."""
    kinds = KINDS[seed], KINDS[(2 * seed + 1) % len(KINDS)]
    weight = random_weight(ks.make_chain(12, 18), seed)
    metric = Metric(random_moment(kinds[0], 18, 3, seed), random_moment(kinds[1], 12, 2, seed), (0.1, 0.0)[seed % 2])
    chain, energy = grid_chain(12, 18, 2, 3), metric.loss(weight)
    lower = CoupledLowerBound(weight, chain, metric)
    assert lower.simple[0] == pytest.approx(energy)
    for rank in (1, 2, 4):
        upper = upper_bound(weight, metric, chain, rank)
        assert 0 <= lower.simple[rank] <= lower(rank) <= upper + 1e-11 * energy
    found = len(weight) * min(trained(weight, chain.patterns(1), metric, seed) for seed in range(2))
    assert lower.simple[1] <= lower(1, tight=True) <= found + 1e-11 * energy
    assert upper_bound(weight, metric, chain, 1) <= 1.1 * found + 1e-6 * energy  # so small a grid has many local optima


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
    chain, energy = grid_chain(4, 4, 2, 2), metric.loss(weight)
    lower = CoupledLowerBound(weight, chain, metric)(1)
    assert 0.5 * best - 1e-5 * energy <= lower <= best + 1e-9 * energy
    assert upper_bound(weight, metric, chain, 1) <= 1.02 * best + 1e-5 * energy


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
    chain = grid_chain(16, 24, 2, 2)
    lower, upper = CoupledLowerBound(weight, chain, metric), upper_bound(weight, metric, chain, 2)
    assert lower.simple[2] < 0.75 * upper
    assert 0.8 * upper < lower(2) <= upper


@pytest.mark.parametrize("kind", ["regular", "singular"])
def test_a_certificate_is_the_formula_of_its_theorem(kind):
    """Evaluated by SVDs, for an arbitrary shift, with the ranks r, p r, q r and p q r of the blocks; q = 3, p = 2."""
    weight = random_weight(ks.make_chain(12, 20))
    metric = Metric(random_moment(kind, 20), random_moment(kind, 12, seed=1), damping=0)
    sides, ranks = [], []
    for moment, groups in ((metric.rows_in_groups(3).matrix, 3), (metric.inputs.matrix, 2)):
        factor = frames.factor_of(moment)
        torch.testing.assert_close(factor @ factor.mT, moment)
        own, rest = frames.fair_splitting(factor, groups).parts()
        parts = [part for part in own if part.shape[1]]
        sides.append((factor, [*parts, rest]))
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
    assert lift.bound(target, 1, shift) <= upper_bound(weight, metric, grid_chain(12, 20, 3, 2), 1)
