"""Products of many small matrices, and the precision of float32 products: that of the call, not the global one."""

import pytest
import torch
from kernel_cases import CASES, check_multiply

from ks.chain.bmm import float32_products, multiply
from ks.chain.passes import ChainPasses
from ks.chain.patterns import make_chain

CPU, CARD = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def settings_are_put_back():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    for settings in (torch.backends, torch.backends.mkldnn, CPU, CARD):
        settings.fp32_precision = "none"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operands_of_any_layout(case):
    check_multiply(multiply, case, torch.float32)
    check_multiply(multiply, case, torch.bfloat16)


class OnACard:
    dtype, is_cuda = torch.float32, True


@pytest.mark.parametrize("globally", ["highest", "high", "medium"])
@pytest.mark.parametrize(
    ("x", "settings", "precision", "during"),
    [
        (torch.ones(1), CPU, "ieee", "ieee"),
        (torch.ones(1), CPU, "tf32", "ieee"),
        (OnACard, CARD, "ieee", "ieee"),
        (OnACard, CARD, "tf32", "tf32"),
    ],
)
def test_the_call_overrules_the_global_setting_and_puts_it_back(x, settings, precision, during, globally):
    torch.set_float32_matmul_precision(globally)
    before = CPU.fp32_precision, CARD.fp32_precision
    seen = []

    def fail_inside():
        with float32_products(x, precision):
            seen.append(settings.fp32_precision)
            raise RuntimeError("an error inside")

    with pytest.raises(RuntimeError, match="an error inside"):
        fail_inside()
    assert seen == [during]
    assert (CPU.fp32_precision, CARD.fp32_precision) == before
    assert torch.get_float32_matmul_precision() == globally


@pytest.mark.parametrize("level", [torch.backends, torch.backends.mkldnn, CPU], ids=["all", "of the CPU", "of matmul"])
def test_a_setting_of_any_level_is_overruled(level):
    level.fp32_precision = "tf32"
    with float32_products(torch.ones(1)):
        assert CPU.fp32_precision == "ieee"
    assert CPU.fp32_precision == "tf32"


def test_other_dtypes_leave_the_setting_alone():
    torch.set_float32_matmul_precision("medium")
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        with float32_products(torch.ones(1, dtype=dtype)):
            assert CPU.fp32_precision == "bf16"


def test_both_passes_of_a_chain_are_exact_under_any_global_setting():
    patterns = make_chain(12, 20).patterns(3)
    passes, x = ChainPasses(patterns), torch.randn(33, 20)
    values = [torch.randn(*pattern) for pattern in patterns]
    results = []
    for globally in ("highest", "medium"):
        torch.set_float32_matmul_precision(globally)
        y, *inner = passes.forward(x, values)
        results.append([y, *passes.backward(torch.ones_like(y), x, values, inner, for_x=True)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-5)
