"""The second moment of the inputs: what is asked of it in energies, roots and samples is one and the same C."""

import math

import pytest
import torch
from measured import KINDS, random_moment

from ks.errors import UsageError
from ks.moments.second_moment import UNIT_MOMENT, SecondMoment

WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1.0, 3.0, 1e-3])
def test_energy_root_and_samples_agree(std, dtype):
    inputs, weight = SecondMoment.isotropic(std), WEIGHT.to(dtype)
    root = inputs.times_root(weight)
    energy = inputs.output_energy(weight)
    assert root.dtype == torch.float64
    assert energy == pytest.approx(root.square().sum().item(), rel=1e-12)
    assert energy == pytest.approx(std**2 * weight.double().square().sum().item(), rel=1e-12)
    samples = torch.eye(10, dtype=torch.float64) * 10**0.5  # of second moment I
    outputs = inputs.transform(samples) @ weight.double().t()
    torch.testing.assert_close(outputs.t() @ outputs / 10, root @ root.t())
    assert energy == pytest.approx(outputs.square().sum(1).mean().item(), rel=1e-12)


def test_samples_keep_their_dtype_and_shape():
    for std in (1.0, 3.0):
        scaled = SecondMoment.isotropic(std).transform(torch.ones(4, 10))
        assert (scaled.shape, scaled.dtype) == ((4, 10), torch.float32)
        assert (scaled == std).all()


def test_unit_inputs_have_unit_energy():
    assert UNIT_MOMENT.output_energy(torch.eye(10)) == 10.0


def test_a_scale_of_inputs_makes_up_for_one_of_the_weight():
    huge = torch.full((2, 3), 1e200, dtype=torch.float64)
    assert SecondMoment.isotropic(1e-200).output_energy(huge) == pytest.approx(6.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_energy_root_and_samples_of_measured_inputs_agree_with_the_moment(kind, dtype):
    moment, weight = random_moment(kind, 10, groups=2), WEIGHT.to(dtype)
    inputs = SecondMoment(moment)
    torch.testing.assert_close(inputs.matrix, moment)
    root, exact = inputs.times_root(weight), weight.double()
    assert root.dtype == torch.float64
    torch.testing.assert_close(root @ root.t(), exact @ moment @ exact.t())
    assert inputs.output_energy(weight) == pytest.approx((exact @ moment @ exact.t()).trace().item(), rel=1e-9)
    samples = inputs.transform(torch.eye(10, dtype=torch.float64) * 10**0.5)  # of second moment I before
    torch.testing.assert_close(samples.t() @ samples / 10, moment)
    assert inputs.transform(torch.ones(3, 10)).dtype == torch.float32


@pytest.mark.parametrize("std", [1.0, 3.0, 1e-3])
def test_measured_inputs_of_second_moment_identity_are_isotropic(std):
    measured, isotropic = SecondMoment(std**2 * torch.eye(10)), SecondMoment.isotropic(std)
    assert measured.output_energy(WEIGHT) == pytest.approx(
        isotropic.output_energy(WEIGHT), rel=1e-6
    )  # a float32 moment
    exact = SecondMoment(std**2 * torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(exact.times_root(WEIGHT), isotropic.times_root(WEIGHT), rtol=1e-12, atol=0)
    assert exact.effective_rank == pytest.approx(10)
    assert exact.coupling(2) is None
    assert isotropic.coupling(2) is None


def test_coupling_is_about_groups_of_features():
    moment = random_moment("block diagonal", 12, groups=2)
    inputs = SecondMoment(moment)
    assert inputs.coupling(1) is None
    assert inputs.coupling(2) is None
    torch.testing.assert_close(inputs.coupling(4), moment)


def test_the_effective_rank_is_that_of_the_eigenvalues():
    inputs = SecondMoment(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
    assert inputs.effective_rank == pytest.approx(49 / 21)
    singular = SecondMoment(random_moment("rank one", 5))
    assert singular.effective_rank == pytest.approx(1.0)


def test_a_moment_that_is_none_is_refused():
    good = random_moment("regular", 4)
    asymmetric, indefinite, broken = good.clone(), good.clone(), good.clone()
    asymmetric[0, 1] += 1e-3 * good.abs().max()
    indefinite[2, 2] = -1.0
    broken[1, 1] = float("nan")
    for moment, message in (
        (good[:3], r"shape \(3, 4\).*square"),
        (good.long(), "int64: a square float matrix"),
        (asymmetric, "not symmetric"),
        (indefinite, "not positive semi-definite: its eigenvalues reach from -"),
        (broken, "NaN"),
    ):
        with pytest.raises(UsageError, match=message):
            SecondMoment(moment)
    with pytest.raises(UsageError, match=r"4 features: a weight of 10 columns needs 10"):
        SecondMoment(good).times_root(WEIGHT)


def test_the_rounding_of_a_moment_in_float32_makes_no_energy_negative():
    moment = random_moment("singular", 40, seed=1).float()
    assert torch.linalg.eigvalsh(moment.double())[0] < 0
    inputs = SecondMoment(moment)
    assert torch.linalg.eigvalsh(inputs.matrix)[0] > -1e-14 * moment.trace()


def test_the_energy_of_a_diverged_chain_is_not_a_number():
    assert math.isnan(SecondMoment(torch.eye(3)).output_energy(torch.full((2, 3), torch.nan)))
