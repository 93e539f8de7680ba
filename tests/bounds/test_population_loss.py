"""The exact loss of a chain, and the range of sampled ones, against samples."""

import pytest
import torch

import ks
from ks.bounds.moments import UNIT_INPUTS, IsotropicInputs
from ks.bounds.population_loss import population_loss, sampled_loss_range


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("num_samples", [1, 20, 500])
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


def test_the_population_loss_is_the_mean_over_inputs():
    torch.manual_seed(0)
    weight = torch.randn(12, 20, dtype=torch.float64)
    layer = ks.KSLinear(20, 12, rank=2, dtype=torch.float64)
    exact = population_loss(weight, layer.factors)
    x = torch.randn(200_000, 20, dtype=torch.float64)
    with torch.no_grad():
        errors = (layer(x) - x @ weight.t()).square().mean(1)
    assert abs(errors.mean().item() - exact) < 4 * errors.std().item() / len(x) ** 0.5


def test_losses_and_their_range_grow_with_the_energy_of_the_inputs():
    torch.manual_seed(0)
    weight = torch.randn(12, 20, dtype=torch.float64)
    layer = ks.KSLinear(20, 12, rank=2, dtype=torch.float64)
    inputs = IsotropicInputs(3.0)
    unit = population_loss(weight, layer.factors)
    assert unit == population_loss(weight, layer.factors, UNIT_INPUTS)
    assert population_loss(weight, layer.factors, inputs) == pytest.approx(9 * unit, rel=1e-12)
    unit_range = sampled_loss_range(weight, layer.factors, 500)
    # The width of a range is computed in float32.
    assert sampled_loss_range(weight, layer.factors, 500, inputs) == pytest.approx(
        [9 * x for x in unit_range], rel=1e-5
    )
