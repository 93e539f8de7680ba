"""The precision of float32 products: that of the call, whatever is set globally."""

import pytest
import torch
from kernel_cases import random_matrix, random_values
from torch._subclasses.fake_tensor import FakeTensorMode

from ks.chain import bmm
from ks.chain.patterns import Pattern

CPU, CARD = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
UNTOUCHED = {"none": "ieee"}  # what a setting says that nobody has touched, and how the libraries then multiply
PATTERN = Pattern(2, 5, 7, 1)


@pytest.fixture(autouse=True)
def precision_of_products(monkeypatch):
    """The settings of the CPU and of the card at each call of torch.bmm; all of them are put back afterwards."""
    seen, multiply, before = [], torch.bmm, torch.get_float32_matmul_precision()

    def recorded(*arguments, **keywords):
        seen.append((CPU.fp32_precision, CARD.fp32_precision))
        return multiply(*arguments, **keywords)

    monkeypatch.setattr(torch, "bmm", recorded)
    yield seen
    torch.set_float32_matmul_precision(before)
    for settings in (torch.backends, torch.backends.mkldnn, CPU, CARD):
        settings.fp32_precision = "none"


def products(device, dtype, precision):
    """Both functions of the backend, on fake tensors, whose device need not exist."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = bmm.empty_values(PATTERN, device, dtype)
        x = torch.empty(PATTERN.cols, 20, device=device, dtype=dtype)
        y = torch.empty(PATTERN.rows, 20, device=device, dtype=dtype)
        bmm.apply_factor(values, x, y, precision=precision)
        bmm.values_gradient(y, x, values, precision=precision)


@pytest.mark.parametrize("globally", ["highest", "high", "medium"])
@pytest.mark.parametrize(
    ("device", "precision", "during"),
    [
        ("cpu", "ieee", "ieee"),
        ("cpu", "tf32", "ieee"),
        ("cuda", "ieee", "ieee"),
        ("cuda", "tf32", "tf32"),
    ],
)
def test_the_call_overrules_the_global_setting_and_puts_it_back(
    precision_of_products, device, precision, during, globally
):
    torch.set_float32_matmul_precision(globally)
    before = CPU.fp32_precision, CARD.fp32_precision
    products(device, torch.float32, precision)
    seen = [pair[device == "cuda"] for pair in precision_of_products]
    assert [UNTOUCHED.get(setting, setting) for setting in seen] == [during] * 2
    assert (CPU.fp32_precision, CARD.fp32_precision) == before
    assert torch.get_float32_matmul_precision() == globally


@pytest.mark.parametrize("level", [torch.backends, torch.backends.mkldnn, CPU], ids=["all", "of the CPU", "of matmul"])
def test_a_setting_of_any_level_is_overruled(precision_of_products, level):
    level.fp32_precision = "tf32"
    assert CPU.fp32_precision == "tf32"
    products("cpu", torch.float32, "ieee")
    assert [cpu for cpu, _ in precision_of_products] == ["ieee"] * 2
    assert CPU.fp32_precision == "tf32"


def test_the_setting_is_put_back_after_an_error(monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError(CPU.fp32_precision)

    monkeypatch.setattr(torch, "bmm", fail)
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(RuntimeError, match="^ieee$"):
        products("cpu", torch.float32, "ieee")
    assert CPU.fp32_precision == "bf16"


def test_other_dtypes_leave_the_setting_alone(precision_of_products):
    torch.set_float32_matmul_precision("medium")
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        products("cpu", dtype, "ieee")
    assert {cpu for cpu, _ in precision_of_products} == {"bf16"}


def test_products_are_exact_under_any_global_setting():
    values, x = random_values(PATTERN, torch.float32), random_matrix(PATTERN.cols, 20, torch.float32, True)
    results = []
    for globally in ("highest", "medium"):
        torch.set_float32_matmul_precision(globally)
        results.append(torch.empty(PATTERN.rows, 20))
        bmm.apply_factor(values, x, results[-1])
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_of_half_precision_activations_in_float32(dtype):
    pattern = Pattern(2, 5, 7, 1)
    gradient, x = (torch.randn(features, 20).to(dtype) for features in (pattern.rows, pattern.cols))
    out, exact = bmm.empty_values(pattern, dtype=torch.float32), bmm.empty_values(pattern, dtype=torch.float64)
    bmm.values_gradient(gradient, x, out)
    bmm.values_gradient(gradient.double(), x.double(), exact)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=1e-1)
