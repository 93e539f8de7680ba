"""Losses, floors and chains are the same inside and outside; only the numbers that a training works with differ."""

import pytest
import torch
from layer_rows import KINDS, WEIGHT, layer_rows, second_moment

import ks
from ks.bounds.floors import floor_curve, loss_floor
from ks.bounds.population_loss import population_loss
from ks.layer import KSLinear
from ks.moments.second_moment import SecondMoment
from ks.training.whitening import isotropic_coordinates, measured_coordinates

FAMILIES = ("monarch", "lowrank", "butterfly", "lowrank_butterfly")


def inside(kind, family="monarch", weight=WEIGHT, centred=False):
    """Return (rows, mean, C, P, chain, coordinates, C', W')."""
    rows = layer_rows(kind, cols=weight.shape[1])
    mean = rows.mean(0) if centred else None
    energy = SecondMoment(second_moment(rows)).output_energy(weight) / len(weight)
    moment = second_moment(rows, mean)
    chain = ks.make_chain(*weight.shape, family)
    coordinates, inputs = measured_coordinates(chain, energy, moment, mean)
    return rows, moment, energy, chain, coordinates, inputs, coordinates.weight(weight.double().clone())


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


@pytest.mark.parametrize("family", ["monarch", "lowrank", "butterfly"])
@pytest.mark.parametrize("kind", ["regular", "singular"])
def test_floors_are_the_same_inside_and_outside(kind, family):
    _, moment, energy, chain, _, inputs, weight = inside(kind, family)
    measured = SecondMoment(moment)
    tiny = 1e-9 * energy
    torch.testing.assert_close(
        floor_curve(weight, chain, inputs) * energy, floor_curve(WEIGHT, chain, measured), rtol=0, atol=tiny
    )
    for found, expected in zip(
        loss_floor(weight, chain, [1, 2, 3], inputs), loss_floor(WEIGHT, chain, [1, 2, 3], measured), strict=True
    ):
        assert found.lower * energy == pytest.approx(expected.lower, rel=1e-6, abs=tiny)
        # A descent may end elsewhere.
        assert found.upper * energy == pytest.approx(expected.upper, rel=0.01, abs=1e-4 * energy)


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
    torch.testing.assert_close(coordinates.energies(moment), found.square().mean(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_chain_acts_on_raw_inputs_and_has_the_bias_of_the_centre(tmp_path, family, batch_last):
    rows, _, energy, chain, coordinates, _, _ = inside("regular", family, centred=True)
    model = random_chain(chain)
    model.batch_last = batch_last
    coordinates.save(model, WEIGHT, tmp_path / "chain.pth")
    saved = ks.load(tmp_path / "chain.pth")
    assert saved.batch_last is batch_last
    mean = rows.mean(0)
    dense = saved.to_dense()
    torch.testing.assert_close(saved.bias, (WEIGHT.double() - dense) @ mean)
    centred = coordinates.samples(rows - mean)
    expected = energy**0.5 * (centred @ model.to_dense().t()) + WEIGHT.double() @ mean
    outputs = saved(rows.t()).t() if batch_last else saved(rows)
    torch.testing.assert_close(outputs, expected)


def test_a_saved_chain_without_a_centre_has_no_bias(tmp_path):
    *_, chain, coordinates, _, _ = inside("regular")
    coordinates.save(random_chain(chain), WEIGHT, tmp_path / "chain.pth")
    assert ks.load(tmp_path / "chain.pth").bias is None


@pytest.mark.parametrize(("kind", "dtype"), [("regular", torch.float32), ("steep", torch.float64)])
def test_a_chain_of_badly_conditioned_inputs_is_saved_in_float64(kind, dtype):
    _, moment, energy, chain, coordinates, inputs, weight = inside(kind, "lowrank")
    model = random_chain(chain, dtype=torch.float32)
    outside = coordinates.outside(model)
    assert outside.factors[0].dtype == dtype
    assert model.factors[0].dtype == torch.float32
    loss = population_loss(weight, model.factors, inputs) * energy
    assert loss == pytest.approx(population_loss(WEIGHT, outside.factors, SecondMoment(moment)), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_isotropic_inputs_from_a_file_are_isotropic(family):
    chain, std = ks.make_chain(16, 24, family), 3.0
    energy = SecondMoment.isotropic(std).output_energy(WEIGHT) / 16
    measured, inputs = measured_coordinates(chain, energy, std**2 * torch.eye(24).double(), None)
    isotropic = isotropic_coordinates(WEIGHT)
    torch.testing.assert_close(inputs.matrix, torch.eye(24).double(), rtol=0, atol=1e-12)
    weights = [coordinates.weight(WEIGHT.double().clone()) for coordinates in (measured, isotropic)]
    assert weights[0].norm().item() == pytest.approx(weights[1].norm().item(), rel=1e-12)
    if family != "lowrank_butterfly":
        curves = floor_curve(weights[0], chain, inputs), floor_curve(weights[1], chain)
        torch.testing.assert_close(*curves, rtol=1e-9, atol=1e-14)


def ill_conditioned(digits, seed):
    """Return C of four column groups that couple, each with singular values from 1 to 10^-digits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    scale = torch.logspace(0, -digits, 6, dtype=torch.float64)
    samples = normal(4000, 24)
    groups = [samples @ torch.linalg.qr(normal(24, 6))[0] * scale @ torch.linalg.qr(normal(6, 6))[0] for _ in range(4)]
    return second_moment(torch.cat(groups, 1))


@pytest.mark.parametrize("digits", [6, 7, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_that_whitening_enlarges_is_no_reason_to_refuse(digits, dtype):
    chain = ks.make_chain(16, 24)
    for seed in range(25):
        measured = SecondMoment(ill_conditioned(digits, seed).to(dtype))
        coordinates, inputs = measured_coordinates(chain, 1.0, measured.matrix, None)
        assert torch.linalg.eigvalsh(inputs.matrix)[0] > -1e-9
        model = random_chain(chain)
        weight = coordinates.weight(WEIGHT.double().clone())
        outside = population_loss(WEIGHT, coordinates.outside(model).factors, measured)
        assert population_loss(weight, model.factors, inputs) == pytest.approx(outside, rel=1e-3)
