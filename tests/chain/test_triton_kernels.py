"""Every kernel and gradient in Triton's interpreter, on the CPU, against float64."""

import importlib.util
import itertools
from collections import Counter

import pytest
import torch
from conftest import ROOT
from interpreted import interpreter
from kernel_cases import (
    PATTERNS,
    check_factor,
    check_passes,
    check_values_gradient,
    random_case,
    random_matrix,
    random_values,
)

from ks.chain import bmm, tiles
from ks.chain.backend import choose_impl
from ks.chain.operator import chain_product
from ks.chain.passes import ChainPasses, choose_working_impl
from ks.chain.patterns import make_chain
from ks.chain.reference import chain_to_dense
from ks.errors import UsageError
from ks.layer import KSLinear

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

SOURCE = ROOT / "ks" / "product" / "triton_kernels.py"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = list(itertools.product([False, True], repeat=2))


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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_factor(kernels, pattern, dtype, layouts, transposed):
    check_factor(kernels, pattern, dtype, *layouts, transposed=transposed)


@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_gradient(kernels, pattern, dtype, layouts):
    check_values_gradient(kernels, pattern, dtype, *layouts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_of_half_precision_activations_may_stay_in_float32(kernels, dtype):
    """It passes the rule with the epsilon of float32, because nothing is rounded to half."""
    check_values_gradient(kernels, PATTERNS[0], dtype, False, True, out_dtype=torch.float32)


@pytest.mark.parametrize("batch", [1, 16, 33, 200])
def test_any_batch(kernels, batch):
    pattern = PATTERNS[0]
    check_factor(kernels, pattern, torch.float32, False, False, batch)
    check_values_gradient(kernels, pattern, torch.float32, False, False, batch)


def in_parts_of(monkeypatch, samples):
    tile = tiles.Tiles(16, 16, 16, warps=4, stages=1, samples_of_part=samples)
    monkeypatch.setattr(tiles, "gradient_tiles", lambda *_: tile)


def test_a_batch_in_parts_is_summed_whole_and_always_alike(kernels, monkeypatch):
    pattern = PATTERNS[0]
    in_parts_of(monkeypatch, 48)
    check_values_gradient(kernels, pattern, torch.float32, False, True, batch=100)
    check_values_gradient(kernels, pattern, torch.float16, False, True, batch=49)
    gradient, x = (random_matrix(size, 100, torch.float32, True) for size in (pattern.rows, pattern.cols))
    results = [bmm.empty_values(pattern) for _ in range(2)]
    for out in results:
        kernels.values_gradient(gradient, x, out)
    assert torch.equal(*results)


def is_rounded_once(kernels, monkeypatch) -> bool:
    """Whether a float16 gradient, summed in 40 parts, is within half a unit in the last place of the exact one."""
    pattern = PATTERNS[0]
    in_parts_of(monkeypatch, 16)
    gradient, x = (random_matrix(size, 640, torch.float16, True) for size in (pattern.rows, pattern.cols))
    out, exact = bmm.empty_values(pattern, dtype=torch.float16), bmm.empty_values(pattern, dtype=torch.float64)
    kernels.values_gradient(gradient, x, out)
    bmm.values_gradient(gradient.double(), x.double(), exact)
    unit = 2.0 ** (exact.abs().log2().floor() - 10)
    # Sums of 640 products in float32 differ from the exact ones by less than 1e-4.
    return bool(((out.double() - exact).abs() <= unit / 2 + 1e-4).all())


def test_parts_are_summed_in_float32_and_rounded_once(kernels, monkeypatch):
    assert is_rounded_once(kernels, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dtype=torch.float32,", "dtype=x.dtype,"),
        ("out.copy_(sums.sum(0))", "torch.sum(sums, 0, out=out)"),
    ],
    ids=["parts in half precision", "a sum that rounds first"],
)
def test_parts_that_are_rounded_before_they_are_summed_are_found(kernels, monkeypatch, old, new, tmp_path):
    assert not is_rounded_once(with_a_fault(old, new, tmp_path), monkeypatch)


FAMILIES = [(24, 36, "monarch", 3), (7, 13, "monarch", 2), (24, 40, "lowrank", 5), (24, 40, "butterfly", 2)]
FAMILIES += [(16, 16, "lowrank_butterfly", 1)]


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_the_whole_chain_and_its_gradients(kernels, case, batch_last):
    rows, cols, family, rank = case
    patterns = make_chain(rows, cols, family).patterns(rank)
    values = [random_values(p, torch.float32, seed=i).requires_grad_() for i, p in enumerate(patterns)]
    x = torch.randn(3, 5, cols, requires_grad=True)
    y = chain_product(x.movedim(-1, 0) if batch_last else x, values, batch_last, impl="triton")
    y = y.movedim(0, -1) if batch_last else y
    expected = x @ chain_to_dense(values).t()
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(expected)
    for wanted in ([x, *values], [x], values, values[-1:]):
        ours = torch.autograd.grad(y, wanted, gradient, retain_graph=True)
        theirs = torch.autograd.grad(expected, wanted, gradient, retain_graph=True)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other)


def test_block_order_and_empty_batches(kernels):
    patterns = make_chain(24, 36).patterns(3)
    values = [random_values(p, torch.float32) for p in patterns]
    for batch in (0, 5):
        x = torch.randn(batch, 36)
        ours, plain = (
            ChainPasses(patterns, batch, x.device, x.dtype, block_order=True, impl=impl) for impl in ("triton", "bmm")
        )
        y, *inner = ours.forward(x, values)
        torch.testing.assert_close(y, plain.forward(x, values)[0])
        gradients = ours.backward(y, x, values, inner)
        expected = plain.backward(y, x, values, inner)
        for mine, other in zip(gradients, expected):
            torch.testing.assert_close(mine, other)


def test_random_chains_equal_the_dense_product(kernels):
    """As tests/test_passes.py, on this backend."""
    assert any([check_passes(*random_case(seed), impl="triton", dtype=torch.float32) for seed in range(25)])


@pytest.mark.parametrize(
    "chain", [make_chain(64, 64), make_chain(128, 64, "butterfly")], ids=lambda chain: chain.family
)
def test_chains_whose_left_factor_is_interleaved_equal_the_dense_product(kernels, chain, monkeypatch):
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
def test_the_kernels_take_what_matrix_products_would_copy(layout):
    patterns = make_chain(64, 64).patterns(4)
    passes = ChainPasses(patterns, 32, torch.device("cpu"), torch.float32, impl="triton", **layout)
    taken = [[backend is not bmm for backend in side] for side in (passes.forward_backends, passes.backward_backends)]
    assert taken == [[not layout, False]] * 2


def test_matrix_products_take_what_has_too_much_traffic():
    passes = ChainPasses(make_chain(4096, 4096).patterns(64), 25088, torch.device("cpu"), torch.half, impl="triton")
    assert passes.forward_backends == passes.backward_backends == [bmm, bmm]


def test_the_interpreter_may_be_asked_for():
    assert choose_impl("triton", torch.device("cpu")) == ("triton", "as asked")
    assert choose_impl("auto", torch.device("cpu"))[0] == "bmm"


def test_what_cannot_see_through_the_kernels_is_refused(kernels):
    layer, x = KSLinear(24, 36, 3, impl="triton"), torch.randn(5, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    with pytest.raises(UsageError, match="no second derivatives; set layer.impl = 'auto'"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(UsageError, match="cannot be compiled, exported or traced"):
        torch.jit.trace(layer, x)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(layer)(torch.randn(2, 5, 24))
    layer.impl = "auto"
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x)[0], gradient)


def test_the_kernels_are_tried_on_random_data_before_a_training(kernels, monkeypatch):
    sizes = (make_chain(64, 64).patterns(4), 32, torch.device("cpu"), torch.float32)
    assert choose_working_impl("triton", *sizes) == ("triton", "as asked", None)
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
        check_factor,
        torch.float16,
    ),
    "factor: 1% in the last tile of k": (
        "tile = tl.trans(x_tiles[g])",
        "tile = tl.trans(x_tiles[g]) * tl.where(first_k < 32, 1.0, 1.01).to(x.dtype.element_ty)",
        "times what is allowed",
        check_factor,
        torch.float32,
    ),
    "values gradient: 1% of the first samples": (
        "rows = tl.trans(gradient_tiles[g])",
        "rows = tl.trans(gradient_tiles[g]) * tl.where(n[None, :] < 16, 1.01, 1.0).to(x.dtype.element_ty)",
        "times what is allowed",
        check_values_gradient,
        torch.float16,
    ),
    "a store that ignores the end of the features": (
        "inside = (n[:, None, None] < batch) & (f[None, :, None] < features)",
        "inside = (n[:, None, None] < batch) & (f[None, :, None] < features + 1)",
        "wrote outside",
        check_factor,
        torch.float32,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(kernels, fault, tmp_path):
    old, new, message, check, dtype = FAULTS[fault]
    module = with_a_fault(old, new, tmp_path)
    check(kernels, PATTERNS[0], dtype, False, False)
    with pytest.raises(AssertionError, match=message):
        check(module, PATTERNS[0], dtype, False, False)
