"""Losses and chains are the same inside and outside; only the numbers that a run works with differ."""

import pytest
import torch
from layer_rows import KINDS, WEIGHT, layer_rows, second_moment

import ks
from ks.bounds.population_loss import population_loss
from ks.layer import KSLinear
from ks.moments.metric import Metric
from ks.moments.second_moment import SecondMoment
from ks.training.whitening import measured_coordinates

FAMILIES = ("monarch", "lowrank", "butterfly", "lowrank_butterfly")


def inside(kind, family="monarch", weight=WEIGHT, centred=False):
    """Return (rows, mean, C, P, chain, coordinates, C', W')."""
    rows = layer_rows(kind, cols=weight.shape[1])
    mean = rows.mean(0) if centred else None
    energy = SecondMoment(second_moment(rows)).output_energy(weight) / len(weight)
    moment = second_moment(rows, mean)
    chain = ks.make_chain(*weight.shape, family)
    coordinates, metric = measured_coordinates(chain, energy**0.5, Metric(moment), mean)
    return rows, moment, energy, chain, coordinates, metric.inputs, coordinates.weight(weight.double().clone())


def random_chain(chain, rank=2, dtype=torch.float64):
    torch.manual_seed(0)
    return KSLinear.from_patterns(chain.patterns(rank), dtype=dtype)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_has_the_same_loss_inside_and_outside(kind, family, centred):
    _, moment, energy, chain, coordinates, inputs, weight = inside(kind, family, centred=centred)
    model = random_chain(chain)
    outside = coordinates.outside(model)
    loss = population_loss(weight, model.factors, inputs) * energy
    digits = 1e-7 if kind == "steep" else 1e-9  # of float64, less the condition
    assert loss == pytest.approx(population_loss(WEIGHT, outside.factors, SecondMoment(moment)), rel=digits)
    assert inputs.output_energy(weight) * energy == pytest.approx(SecondMoment(moment).output_energy(WEIGHT), rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_column_group_is_white_inside(kind, family):
    rows, moment, _, chain, coordinates, inputs, _ = inside(kind, family)
    groups = chain.patterns(1)[-1].a
    found = coordinates.samples(rows)
    torch.testing.assert_close(second_moment(found), inputs.matrix, rtol=0, atol=1e-6)
    for own in inputs.matrix.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).diagonal(0, 0, 2).unbind(-1):
        torch.testing.assert_close(own @ own, own, rtol=0, atol=1e-9)  # the identity, or a projection
        if kind == "regular":
            torch.testing.assert_close(own, torch.eye(len(own)).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("centred", [False, True])
def test_a_saved_chain_acts_on_raw_inputs_and_has_the_bias_of_the_centre(tmp_path, family, batch_last, centred):
    rows, _, energy, chain, coordinates, _, _ = inside("regular", family, centred=centred)
    model = random_chain(chain)
    model.batch_last = batch_last
    coordinates.save(model, WEIGHT, tmp_path / "chain.pth")
    saved = ks.load(tmp_path / "chain.pth")
    assert saved.batch_last is batch_last
    assert (saved.bias is None) is not centred
    mean = rows.mean(0) if centred else torch.zeros(24).double()
    expected = energy**0.5 * (coordinates.samples(rows - mean) @ model.to_dense().t()) + WEIGHT.double() @ mean
    outputs = saved(rows.t()).t() if batch_last else saved(rows)
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize(("kind", "dtype"), [("regular", torch.float32), ("steep", torch.float64)])
def test_a_chain_of_badly_conditioned_inputs_is_saved_in_float64(kind, dtype):
    _, moment, energy, chain, coordinates, inputs, weight = inside(kind, "lowrank")
    model = random_chain(chain, dtype=torch.float32)
    outside = coordinates.outside(model)
    assert outside.factors[0].dtype == dtype
    assert model.factors[0].dtype == torch.float32
    loss = population_loss(weight, model.factors, inputs) * energy
    assert loss == pytest.approx(population_loss(WEIGHT, outside.factors, SecondMoment(moment)), rel=1e-5)


def ill_conditioned(digits, seed):
    """Return C of four column groups that couple, each with singular values from 1 to 10^-digits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    scale = torch.logspace(0, -digits, 6, dtype=torch.float64)
    samples = normal(4000, 24)
    groups = [samples @ torch.linalg.qr(normal(24, 6))[0] * scale @ torch.linalg.qr(normal(6, 6))[0] for _ in range(4)]
    return second_moment(torch.cat(groups, 1))


@pytest.mark.parametrize("digits", [6, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_that_whitening_enlarges_is_no_reason_to_refuse(digits, dtype):
    chain = ks.make_chain(16, 24)
    for seed in range(25):
        measured = SecondMoment(ill_conditioned(digits, seed).to(dtype))
        coordinates, metric = measured_coordinates(chain, 1.0, Metric(measured), None)
        assert torch.linalg.eigvalsh(metric.inputs.matrix)[0] > -1e-9
        model = random_chain(chain)
        weight = coordinates.weight(WEIGHT.double().clone())
        outside = population_loss(WEIGHT, coordinates.outside(model).factors, measured)
        assert population_loss(weight, model.factors, metric) == pytest.approx(outside, rel=1e-3)
