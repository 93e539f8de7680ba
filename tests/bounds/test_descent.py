"""Descents under a second moment: they never rise, end at a stationary point, and report the loss of their result."""

import pytest
import torch
from chains import random_chain, random_weight
from measured import KINDS, random_moment, weighted_loss

import ks
from ks.bounds.descent import GridDescent, refine_factors, root_and_inverse
from ks.bounds.factorize import factorize
from ks.bounds.floors import loss_floor
from ks.chain.reference import chain_to_dense
from ks.errors import UsageError
from ks.moments.metric import Metric
from ks.moments.second_moment import SecondMoment


def dense_grid(left, right):
    q, p, height, _ = left.shape
    return (left @ right.mT).permute(2, 0, 1, 3).reshape(q * height, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "rank", "damping"),
    [((24, 36), 1, None), ((60, 24), 3, None), ((12, 12), 3, None), ((24, 36), 2, 0.0), ((24, 36), 2, 0.1)],
)
def test_descent_over_the_blocks_of_a_grid_never_rises(shape, rank, damping, kind):
    """Under C alone, and under a G of every kind with a steep C."""
    weight = random_weight(ks.make_chain(*shape))
    metric = Metric(random_moment(kind, shape[1], groups=4))
    if damping is not None:
        metric = Metric(random_moment("steep", shape[1]), random_moment(kind, shape[0], groups=3, seed=1), damping)
    descent = GridDescent(weight, metric, 3, 4)
    dense = dense_grid(*descent.factors(rank))
    history, energy = descent.history, metric.loss(weight)
    assert history == sorted(history, reverse=True)
    assert metric.loss(weight - dense) == pytest.approx(history[-1], abs=1e-9 * energy)
    blocks = dense.reshape(-1, 3, 4, shape[1] // 4).permute(1, 2, 0, 3)
    assert torch.linalg.matrix_rank(blocks, rtol=1e-9).max() <= rank


@pytest.mark.parametrize("gradients", [None, "regular", "block diagonal"])
def test_every_block_of_a_converged_grid_is_the_best_given_the_others(gradients):
    """By one weighted truncated SVD, from the definition."""
    weight, moment = random_weight(ks.make_chain(20, 24)), random_moment("regular", 24)
    outputs = torch.eye(20, dtype=torch.float64)
    if gradients:
        grouped = torch.arange(20).view(2, 10).t().flatten()  # contiguous groups become t::2
        outputs = random_moment(gradients, 20, groups=2, seed=1)[grouped][:, grouped]
    metric = Metric(moment, outputs if gradients else None)
    outputs = metric.outputs.matrix_of(20)
    dense = dense_grid(*GridDescent(weight, metric, 2, 3).factors(2, 2000, 1e-12))
    for t in range(2):
        for i in range(3):
            own, rows = slice(8 * i, 8 * i + 8), slice(t, None, 2)
            error = weight - dense
            error[rows, own] = weight[rows, own]
            row_root, row_inverse = root_and_inverse(outputs[rows, rows])
            root, inverse = root_and_inverse(moment[own, own])
            target = row_inverse @ outputs[rows] @ error @ moment[:, own] @ inverse.mT
            left, singular, right = torch.linalg.svd(target, full_matrices=False)
            best = (left[:, :2] * singular[:2]) @ right[:2]
            torch.testing.assert_close(row_root.mT @ dense[rows][:, own] @ root, best, atol=1e-3, rtol=1e-3)


def test_inputs_that_do_not_count_are_those_of_the_projected_weight():
    """In zero columns of C, a grid that can be exact still is; outputs that cost nothing, in zero rows of G, are 0."""
    generator = torch.Generator().manual_seed(0)
    weight = dense_grid(*(torch.randn(2, 2, size, 2, dtype=torch.float64, generator=generator) for size in (6, 8)))
    moment, gradients = random_moment("regular", 16), random_moment("regular", 12)
    for dead in (moment, gradients):
        dead[:3], dead[:, :3] = 0, 0
    dense = dense_grid(*GridDescent(weight, Metric(moment, gradients, damping=0), 2, 2).factors(2, 1000, 1e-14))
    torch.testing.assert_close(dense[3:], weight[3:], atol=1e-3, rtol=1e-3)
    assert not dense[:3].any()


@pytest.mark.parametrize(("seed", "kind"), [*enumerate(KINDS)])
@pytest.mark.parametrize("two_sided", [False, True])
def test_descent_over_factors_never_rises_from_any_start(seed, kind, two_sided):
    chain = random_chain(seed)
    gradients = random_moment("regular", chain.rows) if two_sided else None
    weight, metric = random_weight(chain, seed), Metric(random_moment(kind, chain.cols, seed=seed), gradients)
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(*pattern, dtype=torch.float64, generator=generator) for pattern in chain.patterns(2)]
    values, history = refine_factors(weight, metric, start, 20)
    assert history == sorted(history, reverse=True)
    assert history[-1] < history[0]
    assert metric.loss(weight - chain_to_dense(values)) == pytest.approx(history[-1], abs=1e-9 * history[0])


@pytest.mark.parametrize(("seed", "two_sided"), [(0, False), (1, False), (1, True)])
def test_a_descent_over_factors_ends_where_the_gradient_vanishes(seed, two_sided):
    chain = random_chain(seed, length=3)
    weight, moment = random_weight(chain, seed), random_moment("regular", chain.cols, seed=seed)
    gradients = random_moment("regular", chain.rows) if two_sided else torch.eye(chain.rows, dtype=torch.float64)
    metric = Metric(moment, gradients if two_sided else None, damping=0)
    values, _ = refine_factors(weight, metric, factorize(weight, chain.patterns(2), moment), 2000, 1e-15)
    values = [value.clone().requires_grad_() for value in values]
    error = weight - ks.chain_product(torch.eye(chain.cols, dtype=torch.float64), values, batch_last=True)
    ((gradients @ error @ moment) * error).sum().backward()
    assert all(value.grad.norm() * value.norm() <= 1e-4 * metric.loss(weight) for value in values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["monarch", "butterfly", "lowrank"])
def test_a_factorisation_for_the_inputs_reaches_the_upper_bound_and_beats_one_for_white_inputs(family, kind):
    chain = ks.make_chain(24, 36, family)
    weight, moment = random_weight(chain), random_moment(kind, 36, groups=4)
    inputs, energy = SecondMoment(moment), weighted_loss(weight, torch.zeros_like(weight), moment)
    (floor,) = loss_floor(weight, chain, [2], inputs)
    losses = {}
    for given in (moment, inputs, None):
        values = factorize(weight, chain.patterns(2), given)
        assert [tuple(value.shape) for value in values] == list(chain.patterns(2))
        losses[given] = weighted_loss(weight, chain_to_dense(values), moment)
    assert losses[moment] == losses[inputs] == pytest.approx(floor.upper, abs=1e-9 * energy)
    assert losses[inputs] <= losses[None] + 1e-12 * energy


def test_a_moment_of_another_size_is_refused():
    with pytest.raises(UsageError, match="second moment of 12 features"):
        factorize(torch.randn(12, 20), ks.make_chain(12, 20).patterns(2), random_moment("regular", 12))


def test_a_large_grid_whose_row_groups_are_coupled_has_one_start():
    weight = torch.randn(240, 288, dtype=torch.float64)
    moment, gradients = random_moment("regular", 288), random_moment("regular", 240)
    starts = [len([*GridDescent(weight, metric, 4, 4)._starts(1)]) for metric in (moment, Metric(moment, gradients))]
    assert starts == [4, 1]
