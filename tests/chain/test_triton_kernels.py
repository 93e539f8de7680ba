"""Every kernel and gradient in Triton's interpreter, on the CPU, against float64."""

import importlib.util
from collections import Counter

import pytest
import torch
from conftest import ROOT
from interpreted import interpreter
from kernel_cases import (
    FACTOR_CASES,
    GRADIENT_CASES,
    PATTERNS,
    check_factor,
    check_passes,
    check_values_gradient,
    random_case,
    random_matrix,
)

from ks.chain import bmm, tiles
from ks.chain.passes import ChainPasses, choose_working_impl
from ks.chain.patterns import make_chain
from ks.errors import UsageError
from ks.layer import KSLinear

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

SOURCE = ROOT / "ks" / "chain" / "triton_kernels.py"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with interpreter("ks.chain.triton_kernels") as modules:
        yield modules[0]


def with_a_fault(old, new, folder):
    """The module of the kernels with a line of its source changed."""
    source = SOURCE.read_text()
    assert source.count(old) == 1
    faulty = folder / "faulty_kernels.py"
    faulty.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty_kernels", faulty)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FACTOR_CASES, ids=str)
def test_factor(kernels, case, dtype):
    check_factor(kernels, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_values_gradient(kernels, case, dtype):
    check_values_gradient(kernels, case, dtype)


def test_a_gradient_of_half_precision_activations_may_stay_in_float32(kernels):
    """It passes the rule with the epsilon of float32, because nothing is rounded to half."""
    check_values_gradient(kernels, GRADIENT_CASES[0], torch.float16, out_dtype=torch.float32)


def test_parts_of_a_batch_are_summed_in_float32_in_a_fixed_order_and_rounded_once(kernels, monkeypatch):
    assert is_rounded_once(kernels, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [("dtype=torch.float32,", "dtype=x.dtype,"), ("out.copy_(sums.sum(0))", "torch.sum(sums, 0, out=out)")],
    ids=["parts in half precision", "a sum that rounds first"],
)
def test_parts_that_are_rounded_before_they_are_summed_are_found(kernels, monkeypatch, old, new, tmp_path):
    assert not is_rounded_once(with_a_fault(old, new, tmp_path), monkeypatch)


def is_rounded_once(kernels, monkeypatch) -> bool:
    """Whether a float16 gradient, summed in 40 parts, is within half a unit in the last place of the exact one."""
    pattern = PATTERNS[0]
    monkeypatch.setattr(tiles, "gradient_tiles", lambda *_: tiles.GradientTiles(16, 16))
    gradient, x = (random_matrix(size, 640, torch.float16, True) for size in (pattern.rows, pattern.cols))
    out, again = (bmm.empty_values(pattern, dtype=torch.float16) for _ in range(2))
    exact = bmm.empty_values(pattern, dtype=torch.float64)
    kernels.values_gradient(gradient, x, out)
    kernels.values_gradient(gradient, x, again)
    assert torch.equal(out, again)
    bmm.values_gradient(gradient.double(), x.double(), exact)
    unit = 2.0 ** (exact.abs().log2().floor() - 10)
    # Sums of 640 products in float32 differ from the exact ones by less than 1e-4.
    return bool(((out.double() - exact).abs() <= unit / 2 + 1e-4).all())


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("family", ["monarch", "butterfly", "lowrank"])
def test_the_layer_and_its_gradients_are_those_of_plain_torch(kernels, family, batch_last):
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


def test_random_chains_equal_the_dense_product(kernels):
    """As in test_passes.py, on this backend."""
    assert any([check_passes(*random_case(seed), impl="triton", dtype=torch.float32) for seed in range(25)])


@pytest.mark.parametrize("chain", [make_chain(64, 64), make_chain(128, 64, "butterfly")], ids=lambda c: c.family)
def test_interleaved_factors_are_multiplied_by_the_kernels(kernels, chain, monkeypatch):
    launched = Counter()
    for name in ("apply_factor", "values_gradient"):
        monkeypatch.setattr(kernels, name, counted(getattr(kernels, name), launched))
    check_passes(chain.patterns(8), 32, False, False, impl="triton", dtype=torch.float32)
    assert launched == {"apply_factor": 3, "values_gradient": 1}


def counted(function, counter):
    def call(*arguments, **keywords):
        counter[function.__name__] += 1
        return function(*arguments, **keywords)

    return call


@pytest.mark.parametrize("layout", [{"batch_last": True}, {"block_order": True}, {}], ids=str)
def test_kernels_take_only_what_matrix_products_would_copy(layout):
    patterns = make_chain(64, 64).patterns(4)
    passes = ChainPasses(patterns, 32, torch.device("cpu"), torch.float32, impl="triton", **layout)
    assert [backend is not bmm for backend in passes.backends] == [not layout, False]


def test_what_cannot_see_through_the_kernels_is_refused(kernels):
    layer, x = KSLinear(24, 36, 3, impl="triton"), torch.randn(5, 24, requires_grad=True)
    with pytest.raises(UsageError, match="no second derivatives; set layer.impl = 'auto'"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(UsageError, match="cannot be compiled, exported or traced"):
        torch.jit.trace(layer, x)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(layer)(torch.randn(2, 5, 24))


def test_the_kernels_are_tried_on_random_data_before_a_run(kernels, monkeypatch):
    sizes = (make_chain(64, 64).patterns(4), 32, torch.device("cpu"), torch.float32)
    assert choose_working_impl("triton", *sizes) == ("triton", "as asked")
    right = kernels.apply_factor

    def wrong(factor, x, out, **options):
        right(factor, x, out, **options)
        out[0] *= 1.5

    monkeypatch.setattr(kernels, "apply_factor", wrong)
    with pytest.raises(UsageError, match="the kernels are wrong here"):
        choose_working_impl("triton", *sizes)


FAULTS = {
    "factor: 1% in one of the grouped t": (
        "results = results + (tl.trans(product.to(y.dtype.element_ty)),)",
        "results = results + (tl.trans((product * (1.01 if g == 1 else 1.0)).to(y.dtype.element_ty)),)",
        "times what is allowed",
        (check_factor, (PATTERNS[0], False, False, 20, False)),
        torch.float16,
    ),
    "factor: 1% in the last tile of k": (
        "tile = tl.trans(x_tiles[g])",
        "tile = tl.trans(x_tiles[g]) * tl.where(first_k < 32, 1.0, 1.01).to(x.dtype.element_ty)",
        "times what is allowed",
        (check_factor, (PATTERNS[0], False, False, 20, False)),
        torch.float32,
    ),
    "values gradient: 1% of the first samples": (
        "rows = tl.trans(gradient_tiles[g])",
        "rows = tl.trans(gradient_tiles[g]) * tl.where(n[None, :] < 16, 1.01, 1.0).to(x.dtype.element_ty)",
        "times what is allowed",
        (check_values_gradient, (PATTERNS[0], False, False, 20)),
        torch.float16,
    ),
    "a store that ignores the end of the features": (
        "inside = (n[:, None, None] < batch) & (f[None, :, None] < features)",
        "inside = (n[:, None, None] < batch) & (f[None, :, None] < features + 1)",
        "wrote outside",
        (check_factor, (PATTERNS[0], False, False, 20, False)),
        torch.float32,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(kernels, fault, tmp_path):
    old, new, message, (check, case), dtype = FAULTS[fault]
    check(kernels, case, dtype)
    with pytest.raises(AssertionError, match=message):
        check(with_a_fault(old, new, tmp_path), case, dtype)
