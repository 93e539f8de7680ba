"""The exact loss of a chain, and the range of sampled ones, against samples."""

import pytest
import torch
from chains import loss, random_weight
from measured import random_moment

import ks
from ks.bounds.population_loss import population_loss, sampled_loss_range
from ks.chain.patterns import Chain, make_chain
from ks.chain.reference import chain_to_dense
from ks.moments.second_moment import SecondMoment


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("num_samples", [1, 100])
def test_sampled_losses_lie_in_their_range(num_samples, rank):
    """2,000 samples each, also where the residual has rank one and a loss is a single squared normal variable."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    layer = ks.KSLinear(10, 6, 2, dtype=torch.float64)
    residual = (
        torch.randn(6, rank or 6, generator=generator).double()
        @ torch.randn(rank or 6, 10, generator=generator).double()
    )
    low, high = sampled_loss_range(layer.to_dense() + residual, layer.factors, num_samples)
    inputs = torch.randn(2000, num_samples, 10, generator=generator, dtype=torch.float64)
    losses = (inputs @ residual.t()).square().mean((1, 2))
    expected = residual.square().sum() / 6
    assert low <= losses.min() < expected < losses.max() <= high
    # Not wider than its purpose allows: 2√(30/N) of the loss to each side at the most, and the linear term. A residual
    # of rank one is as wide as that, up to the rounding of float32.
    assert high - low <= expected * (4 * (30 / num_samples) ** 0.5 + 60 / num_samples) * (1 + 1e-6)


MOMENTS = [SecondMoment.isotropic(1.0), SecondMoment.isotropic(3.0), SecondMoment(random_moment("steep", 20))]


@pytest.mark.parametrize("inputs", MOMENTS, ids=["unit", "isotropic", "measured"])
def test_the_population_loss_is_the_mean_over_inputs(inputs):
    torch.manual_seed(0)
    weight = torch.randn(12, 20, dtype=torch.float64)
    layer = ks.KSLinear(20, 12, rank=2, dtype=torch.float64)
    exact = population_loss(weight, layer.factors, inputs)
    x = inputs.transform(torch.randn(200_000, 20, dtype=torch.float64))
    with torch.no_grad():
        errors = (layer(x) - x @ weight.t()).square().mean(1)
    assert abs(errors.mean().item() - exact) < 4 * errors.std().item() / len(x) ** 0.5
    low, high = sampled_loss_range(weight, layer.factors, len(x), inputs)
    assert low < exact < high < 1.2 * exact


CHAINS = [
    make_chain(24, 40, "monarch"),
    make_chain(24, 40, "lowrank"),
    make_chain(24, 40, "butterfly", num_factors=3),
    make_chain(24, 40, "butterfly", num_factors=4),
    make_chain(24, 40, "lowrank_butterfly"),
]


@pytest.mark.parametrize("chain", CHAINS, ids=Chain.describe)
def test_the_population_loss_is_that_of_the_dense_residual_and_an_exact_chain_reads_zero(chain):
    rows, weight = chain.rows, random_weight(chain)
    for rank in (1, 2, 7):
        generator = torch.Generator().manual_seed(1)
        values = [torch.randn(*p, generator=generator, dtype=torch.float64) for p in chain.patterns(rank)]
        assert population_loss(weight, values) == pytest.approx(loss(weight, values), rel=1e-12)
        exact = chain_to_dense(values)
        predict_zero = exact.square().sum().item() / rows
        assert population_loss(exact, values) <= 1e-28 * predict_zero
        tiny = exact + 1e-10 * weight  # 1e-20 of the zero predictor, where ‖W‖² − 2⟨W, Ŵ⟩ + ‖Ŵ‖² has lost every digit
        assert population_loss(tiny, values) == pytest.approx(1e-20 * weight.square().sum().item() / rows, rel=1e-3)
