"""The second moment of the inputs: what is asked of it in energies, roots and samples is one and the same C."""

import pytest
import torch

from ks.bounds.moments import UNIT_INPUTS, IsotropicInputs

WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1.0, 3.0, 1e-3])
def test_energy_root_and_samples_agree(std, dtype):
    inputs, weight = IsotropicInputs(std), WEIGHT.to(dtype)
    root = inputs.times_root(weight)
    energy = inputs.output_energy(weight)
    assert root.dtype == torch.float64
    assert energy == pytest.approx(root.square().sum().item(), rel=1e-12)
    assert energy == pytest.approx(std**2 * weight.double().square().sum().item(), rel=1e-12)
    samples = torch.eye(10, dtype=torch.float64) * 10**0.5  # of second moment I
    outputs = inputs.colour(samples) @ weight.double().t()
    torch.testing.assert_close(outputs.t() @ outputs / 10, root @ root.t())
    assert energy == pytest.approx(outputs.square().sum(1).mean().item(), rel=1e-12)


def test_samples_keep_their_dtype_and_shape():
    for std in (1.0, 3.0):
        coloured = IsotropicInputs(std).colour(torch.ones(4, 10))
        assert (coloured.shape, coloured.dtype) == ((4, 10), torch.float32)
        assert (coloured == std).all()


def test_unit_inputs_have_unit_energy():
    assert UNIT_INPUTS.output_energy(torch.eye(10)) == 10.0


def test_a_scale_of_inputs_makes_up_for_one_of_the_weight():
    huge = torch.full((2, 3), 1e200, dtype=torch.float64)
    assert IsotropicInputs(1e-200).output_energy(huge) == pytest.approx(6.0)
