"""The kernel and what runs on it, in Triton's interpreter, on the CPU, against float64."""

import importlib.util

import pytest
import torch
from conftest import ROOT
from interpreted import interpreter
from kernel_cases import CASES, check_multiply, check_passes

from ks.chain.backend import choose_working_impl
from ks.chain.patterns import make_chain
from ks.errors import UsageError
from ks.layer import KSLinear

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

SOURCE = ROOT / "ks" / "chain" / "triton_kernels.py"


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with interpreter("ks.chain.triton_kernels") as modules:
        yield modules[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operands_of_any_layout(kernels, case, dtype):
    check_multiply(kernels.multiply, case, dtype)


def test_a_product_of_half_precision_may_stay_in_float32(kernels):
    """It passes the rule with the epsilon of float32, because nothing is rounded to half."""
    check_multiply(kernels.multiply, CASES[4], torch.float16, out_dtype=torch.float32)


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("family", ["monarch", "butterfly", "lowrank"])
def test_the_layer_and_its_gradients_are_those_of_plain_torch(family, batch_last):
    layer = KSLinear(64, 128, 16, bias=True, chain=family, batch_last=batch_last)
    for batch_shape in ((2, 16), (5,), (0,)):
        x = torch.randn(64, *batch_shape) if batch_last else torch.randn(*batch_shape, 64)
        results = []
        for impl in ("triton", "auto"):
            layer.impl, inputs = impl, x.clone().requires_grad_()
            y = layer(inputs)
            results.append([y, *torch.autograd.grad(y.square().sum(), [inputs, *layer.parameters()])])
        for ours, plain in zip(*results):
            torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_random_chains_equal_the_dense_product():
    """As in test_passes.py, on this backend."""
    for seed in range(15):
        check_passes(seed, impl="triton")


def test_transforms_that_cannot_see_through_the_kernel_are_refused():
    layer, x = KSLinear(24, 36, 3, impl="triton"), torch.randn(5, 24, requires_grad=True)
    with pytest.raises(UsageError, match="no second derivatives; set layer.impl = 'auto'"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(UsageError, match="cannot be compiled, exported or traced"):
        torch.jit.trace(layer, x)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(layer)(torch.randn(2, 5, 24))


def test_the_kernel_is_tried_on_random_data_before_a_run(kernels, monkeypatch):
    sizes = (make_chain(64, 64).patterns(4), 32, torch.device("cpu"), torch.float32)
    assert choose_working_impl("triton", *sizes, batch_last=True, block_order=True) == ("triton", "as asked")
    right = kernels.multiply

    def wrong(*operands, precision):
        out = right(*operands, precision=precision)
        out[..., 0] *= 1.5
        return out

    monkeypatch.setattr(kernels, "multiply", wrong)
    with pytest.raises(UsageError, match="the kernels are wrong here"):
        choose_working_impl("triton", *sizes)


FAULTS = {
    "1% in the last tile of k": (
        "mask=inside, other=0.0)\n        sums",
        "mask=inside, other=0.0) * tl.where(first < 32, 1.0, 1.01).to(right.dtype.element_ty)\n        sums",
        "times what is allowed",
    ),
    "a tile that ignores where rows end": (
        "rows[:, None] < height",
        "rows[:, None] < height + 1",
        "wrote outside",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, tmp_path):
    old, new, message = FAULTS[fault]
    source = SOURCE.read_text()
    assert source.count(old) == 1
    faulty = tmp_path / "faulty_kernels.py"
    faulty.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty_kernels", faulty)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError, match=message):
        check_multiply(module.multiply, CASES[0], torch.float16)
