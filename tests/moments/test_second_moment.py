"""The second moment of the inputs: energies, roots and samples belong to one and the same C; sums that measure it."""

import math

import pytest
import torch
from conftest import refusal
from measured import KINDS, random_moment
from networks import hand_computed, normal

from ks.moments import second_moment
from ks.moments.metric import Metric
from ks.moments.second_moment import SecondMoment, VectorSums

WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
STDS = (1.0, 3.0, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [*STDS, *KINDS])
def test_energy_root_and_samples_agree_with_the_moment(given, dtype):
    if given in STDS:
        inputs, moment = SecondMoment.isotropic(given), given**2 * torch.eye(10, dtype=torch.float64)
    else:
        moment = random_moment(given, 10, groups=2)
        inputs = SecondMoment(moment)
        torch.testing.assert_close(inputs.matrix, moment)
    weight = WEIGHT.to(dtype)
    root, exact = inputs.times_root(weight), weight.double()
    assert root.dtype == torch.float64
    torch.testing.assert_close(root @ root.t(), exact @ moment @ exact.t())
    torch.testing.assert_close(inputs.output_moment(weight).tril(), (exact @ moment @ exact.t()).tril())
    assert inputs.output_energy(weight) == pytest.approx((exact @ moment @ exact.t()).trace().item(), rel=1e-9)
    samples = inputs.transform(torch.eye(10, dtype=torch.float64) * 10**0.5)  # of second moment I before
    torch.testing.assert_close(samples.t() @ samples / 10, moment)
    assert inputs.transform(torch.ones(3, 10)).dtype == torch.float32


def test_a_scale_of_inputs_makes_up_for_one_of_the_weight():
    huge = torch.full((2, 3), 1e200, dtype=torch.float64)
    assert SecondMoment.isotropic(1e-200).output_energy(huge) == pytest.approx(6.0)


def test_coupling_is_about_groups_of_features():
    moment = random_moment("block diagonal", 12, groups=2)
    inputs = SecondMoment(moment)
    assert inputs.coupling(1) is None
    assert inputs.coupling(2) is None
    torch.testing.assert_close(inputs.coupling(4), moment)
    assert SecondMoment.isotropic(3.0).coupling(2) is None


def test_the_effective_rank_is_that_of_the_eigenvalues():
    assert SecondMoment(torch.diag(torch.tensor([1.0, 2.0, 4.0]))).effective_rank == pytest.approx(49 / 21)
    assert SecondMoment(random_moment("rank one", 5)).effective_rank == pytest.approx(1.0)


def test_a_matrix_that_is_no_second_moment_is_refused():
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
        with refusal(message):
            SecondMoment(moment)
    with refusal("a damping of 1.5: 0 to 1 is allowed"):
        Metric(good, damping=1.5)
    with refusal(r"4 features: a weight of 10 columns needs 10"):
        SecondMoment(good).times_root(WEIGHT)


def test_the_rounding_of_a_moment_in_float32_makes_no_energy_negative():
    moment = random_moment("singular", 40, seed=1).float()
    assert torch.linalg.eigvalsh(moment.double())[0] < 0
    assert torch.linalg.eigvalsh(SecondMoment(moment).matrix)[0] > -1e-14 * moment.trace()


def test_the_energy_of_a_diverged_chain_is_not_a_number():
    assert math.isnan(SecondMoment(torch.eye(3)).output_energy(torch.full((2, 3), torch.nan)))


@pytest.mark.parametrize("width", [1, 7, 9, 30])
def test_sums_of_parts_are_those_computed_by_hand(width, monkeypatch):
    monkeypatch.setattr(second_moment, "CHUNK_ROWS", 8)
    rows, found, other = normal(50, width), VectorSums.zeros(width), VectorSums.zeros(width)
    for part in (rows[:13], rows[:0], rows[13:30]):
        found.add(part)
    other.add(rows[30:])
    found = found.finished().plus(other.finished())
    square, total = hand_computed(rows)
    torch.testing.assert_close(found.sum_xx, square, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.sum_x, total, rtol=1e-13, atol=1e-13)
    assert found.count == 50
    assert torch.equal(found.sum_xx, found.sum_xx.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_promoted_before_it_is_multiplied(dtype):
    rows = (300 * normal(2000, 5)).to(dtype)  # squares overflow float16, and float32 sums of them lose seven digits
    found = VectorSums.zeros(5)
    found.add(rows)
    torch.testing.assert_close(found.finished().sum_xx, hand_computed(rows)[0], rtol=1e-12, atol=0)


def test_products_in_float32_are_summed_in_float64(monkeypatch):
    monkeypatch.setattr(second_moment, "CHUNK_ROWS", 8)
    rows = torch.cat([torch.full((8, 20), 2.0**15), torch.ones(64, 20)])  # a float32 sum of 2³³ loses the ones
    found = VectorSums.zeros(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.add(rows * 1.001, torch.float32)
    square = hand_computed(rows * 1.001)[0]
    torch.testing.assert_close(found.finished().sum_xx, square, rtol=1e-6, atol=0)
    exact = VectorSums.zeros(20)
    exact.add(rows, torch.float32)
    assert torch.equal(exact.finished().sum_xx, hand_computed(rows)[0])
    large = torch.cat([torch.full((1, 20), 2.0**25), torch.ones(7, 20)])
    exact.add(large, torch.float32)
    assert torch.equal(exact.sum_x, hand_computed(torch.cat([rows, large]))[1])
