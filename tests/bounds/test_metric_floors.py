"""Floors and factorisations in a metric G ⊗ C against L-BFGS, explicit formulas and trained chains."""

import numpy as np
import pytest
import torch
from chains import loss, random_weight, trained
from measured import random_moment

import ks
from ks.bounds.factorize import factorize
from ks.bounds.floors import floor_curve, loss_floor
from ks.bounds.floors_file import FloorsFile
from ks.bounds.layer_floors import layer_floors
from ks.bounds.population_loss import population_loss, sampled_loss_range
from ks.bounds.rank_floors import RankFloors
from ks.chain.patterns import Chain
from ks.chain.reference import chain_to_dense
from ks.moments.metric import Metric

BLOCKS = Chain("explicit", 12, 18, (4, 3), (2, 9))  # q = 3 row groups, p = 2 column groups
DEEP = Chain("explicit", 12, 18, (2, 3, 2), (3, 2, 3))  # q = 6, p = 6


def metric_of(rows, cols, inputs="regular", gradients="regular", groups=1, damping=0.1):
    """A metric of random moments; a block diagonal G couples no row groups t::q, q = `groups`."""
    outputs = random_moment(gradients, rows, groups, seed=7)
    if gradients == "block diagonal":
        order = torch.arange(rows).view(groups, -1).t().flatten()  # of contiguous groups, as t::q
        outputs = outputs[order][:, order]
    return Metric(random_moment(inputs, cols, 2), outputs, damping)


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
@pytest.mark.parametrize(
    ("inputs", "gradients", "damping"),
    [("regular", "regular", 0.1), ("singular", "steep", 0.1), ("regular", "singular", 0.0)],
)
def test_low_rank_floors_are_the_optimum_that_l_bfgs_comes_to(shape, inputs, gradients, damping):
    chain = ks.make_chain(*shape, "lowrank")
    weight, metric = random_weight(chain), metric_of(*shape, inputs, gradients, damping=damping)
    energy = metric.loss(weight) / len(weight)
    for rank in (1, 4):
        (floor,) = loss_floor(weight, chain, [rank], metric)
        assert floor.exact
        values = factorize(weight, chain.patterns(rank), metric)
        assert loss(weight, values, metric) == pytest.approx(floor.lower, abs=1e-12 * energy)
        found = trained(weight, chain.patterns(rank), metric)
        assert floor.lower - 1e-12 * energy <= found <= floor.lower + 1e-3 * energy


@pytest.mark.parametrize("inputs", ["block diagonal", "isotropic"])
def test_a_grid_is_exact_where_neither_side_couples_its_groups(inputs):
    """Every block on its own: the tail of the singular values of G_tt^{1/2} W_ti C_ii^{1/2}."""
    weight, metric = random_weight(BLOCKS), metric_of(12, 18, inputs, "block diagonal", 3)
    assert not metric.couples_rows(3)
    for floor in loss_floor(weight, BLOCKS, [1, 2, 3], metric):
        expected = 0.0
        for t in range(3):
            left = torch.linalg.cholesky(metric.outputs.matrix[t::3, t::3])
            for i in (slice(0, 9), slice(9, 18)):
                right = torch.linalg.cholesky(metric.inputs.matrix[i, i])
                expected += torch.linalg.svdvals(left.mT @ weight[t::3, i] @ right)[floor.rank :].square().sum() / 12
        assert floor.exact
        assert floor.lower == pytest.approx(expected.item(), rel=1e-9)
        values = factorize(weight, BLOCKS.patterns(floor.rank), metric)
        assert loss(weight, values, metric) == pytest.approx(floor.lower, rel=1e-9)
        assert trained(weight, BLOCKS.patterns(floor.rank), metric) >= floor.lower * (1 - 1e-9)


@pytest.mark.parametrize("gradients", ["block diagonal", "regular"])
@pytest.mark.parametrize("inputs", ["regular", "block diagonal"])
@pytest.mark.parametrize("chain", [BLOCKS, DEEP], ids=["grid", "deep"])
def test_no_trained_chain_is_below_the_lower_bound_and_the_upper_one_is_attained(chain, inputs, gradients):
    groups = chain.block_shape(1)[1]
    weight, metric = random_weight(chain), metric_of(12, 18, inputs, gradients, groups)
    energy, curve = metric.loss(weight) / 12, floor_curve(weight, chain, metric)
    assert curve[0] == pytest.approx(energy)
    for floor in loss_floor(weight, chain, [1, 2], metric):
        values = factorize(weight, chain.patterns(floor.rank), metric)
        assert loss(weight, values, metric) == pytest.approx(floor.upper, rel=1e-9)
        found = min(trained(weight, chain.patterns(floor.rank), metric, seed) for seed in range(2))
        assert curve[floor.rank] <= floor.lower * (1 + 1e-12)
        assert floor.lower <= found * (1 + 1e-9)
        assert floor.lower <= floor.upper
        assert chain is DEEP or floor.upper <= 1.02 * found


def test_gradients_of_identity_have_the_floors_of_output_energy():
    inputs = random_moment("regular", 18)
    metric = Metric(inputs, torch.eye(12, dtype=torch.float64))
    for chain in (BLOCKS, DEEP, ks.make_chain(12, 18, "lowrank")):
        weight = random_weight(chain)
        for ours, plain in zip(loss_floor(weight, chain, [1, 2], metric), loss_floor(weight, chain, [1, 2], inputs)):
            assert (ours.lower, ours.upper) == pytest.approx((plain.lower, plain.upper), rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
@pytest.mark.parametrize(("gradients", "damping"), [("regular", 0.1), ("singular", 0.0)])
def test_losses_in_the_other_metric_are_those_of_the_chains_themselves(shape, gradients, damping):
    rows, cols = shape
    given = metric_of(rows, cols, "singular", gradients, damping=damping)
    energy = Metric(given.inputs)
    for metric, other in ((given, energy), (energy, given)):
        for chain in (
            ks.make_chain(rows, cols, "lowrank"),
            ks.make_chain(rows, cols, row_splits=(rows, 1), col_splits=(2, cols // 2)),
        ):
            weight = random_weight(chain)
            floors = layer_floors(weight, chain, metric, other=other)
            assert floors.other_energy == pytest.approx(other.loss(weight))
            assert floors.other[0] == 1
            for rank in floors.known[1:]:
                error = weight - chain_to_dense(factorize(weight, chain.patterns(int(rank)), metric, tolerance=1e-3))
                expected = other.loss(error) / floors.other_energy
                assert floors.other[rank] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_file_keeps_the_losses_in_the_other_metric_and_never_takes_them_for_others(tmp_path):
    chain = ks.make_chain(12, 18, "lowrank")
    weight, metric = random_weight(chain), metric_of(12, 18)
    file = FloorsFile(tmp_path / "floors.npz")
    file.add("w", "C", layer_floors(weight, chain, metric.inputs))
    both = layer_floors(weight, chain, metric, other=Metric(metric.inputs))
    file.add("w", "G C", both)
    file.save()
    stored = FloorsFile(tmp_path / "floors.npz")
    assert (stored.find("w", "C", chain).other, stored.find("w", "other G C", chain)) == (None, None)
    found = stored.find("w", "G C", chain)
    assert np.array_equal(found.other, both.other)
    assert found.other_energy == both.other_energy
    file.add("w", "broken", layer_floors(weight, chain, metric, other=Metric(metric.inputs)))
    name = next(name for name in file._arrays if "broken" in name and name.endswith("other"))
    for broken in (both.other[1:], -both.other, both.other * np.nan):
        file._arrays[name] = broken
        assert file.find("w", "broken", chain) is None


def test_the_floors_of_every_rank_go_by_the_metric():
    weight = random_weight(BLOCKS)
    for gradients in ("regular", "block diagonal"):
        metric = metric_of(12, 18, "isotropic", gradients, 3)
        floors = RankFloors(weight * (12 / metric.loss(weight)) ** 0.5, BLOCKS, metric)
        assert floors.curve_is_exact == (gradients == "block diagonal")
        assert floors.curve[0] == pytest.approx(1)
        lowrank = floor_curve(floors.weight, ks.make_chain(12, 18, "lowrank"), metric)
        torch.testing.assert_close(floors.lowrank_curve, lowrank, rtol=0, atol=0)


def test_the_range_of_a_sampled_loss_is_around_the_loss_in_the_metric():
    weight, metric = random_weight(BLOCKS), metric_of(12, 18)
    values = factorize(weight, BLOCKS.patterns(1), metric.inputs)
    expected = population_loss(weight, values, metric)
    assert expected == pytest.approx(loss(weight, values, metric))
    low, high = sampled_loss_range(weight, values, 10**6, metric)
    assert 0.9 * expected < low < expected < high < 1.1 * expected
