"""Every kernel and gradient in Triton's interpreter, on the CPU, against float64.

bfloat16 is left to a GPU (`make test-gpu`): the interpreter's tl.dot is wrong there.
"""

import importlib.util
import itertools
import sys

import pytest
import torch
from conftest import ROOT
from kernel_cases import (
    CHAINS,
    PATTERNS,
    assert_as_exact_as_plain,
    poisoned_matrix,
    random_matrix,
    random_values,
)

from ks import batched, tiles
from ks.chain import chain_backward, chain_forward, choose_impl
from ks.ops import chain_product
from ks.patterns import Pattern, make_chain
from ks.reference import chain_to_dense

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.float64]
LAYOUTS = list(itertools.product([False, True], repeat=2))


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Triton decides at import whether kernels are interpreted."""
    assert "ks.kernels" not in sys.modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield
    sys.modules.pop("ks.kernels", None)


@pytest.fixture(scope="module")
def kernels(interpreter):
    from ks import kernels

    return kernels


def check_factor(kernels, pattern, dtype, x_layout, out_layout, batch=20, block_order=False, transposed=False):
    """y = K x, or Kᵀ x; block order is that of the b side."""
    values = random_values(pattern, dtype)
    factor = values.transpose(1, 2) if transposed else values
    a, b, c, d = factor.shape
    x = random_matrix(a * c * d, batch, dtype, x_layout)
    out = poisoned_matrix(a * b * d, batch, dtype, out_layout)
    order = {"x_block_order" if transposed else "out_block_order": block_order}
    kernels.apply_factor(factor, x, out, **order)
    plain, exact = torch.empty_like(out), torch.empty_like(out, dtype=torch.float64)
    batched.apply_factor(factor, x, plain, **order)
    batched.apply_factor(factor.double(), x.double(), exact, **order)
    shape = (a, d, b, batch) if block_order and not transposed else (a, b, d, batch)
    dims = (2, 3) if block_order and not transposed else (1, 3)
    assert_as_exact_as_plain(*(y.reshape(shape) for y in (out, plain, exact)), dims)


def check_values_gradient(kernels, pattern, dtype, g_layout, x_layout, batch=20, block_order=False):
    gradient = random_matrix(pattern.rows, batch, dtype, g_layout)
    x = random_matrix(pattern.cols, batch, dtype, x_layout, seed=2)
    results = [batched.empty_values(pattern, dtype=kind).fill_(torch.nan) for kind in (dtype, dtype, torch.float64)]
    kernels.values_gradient(gradient, x, results[0], block_order=block_order)
    batched.values_gradient(gradient, x, results[1], block_order=block_order)
    batched.values_gradient(gradient.double(), x.double(), results[2], block_order=block_order)
    assert_as_exact_as_plain(*results, (1, 2))


def check_pair(kernels, patterns, dtype, layout, batch=20, keep=True, block_order=False, transposed=False):
    left, right = (random_values(pattern, dtype, seed=seed) for seed, pattern in enumerate(patterns))
    rank = tiles.chainability(*patterns)
    tile = tiles.Tiles(16, 16, 16, rank=tiles._power_of_two(rank, 16, 64))
    rows, cols = (patterns[1].cols, patterns[0].rows) if transposed else (patterns[0].rows, patterns[1].cols)
    x = random_matrix(cols, batch, dtype, layout)
    out = poisoned_matrix(rows, batch, dtype, layout)
    inner = poisoned_matrix(patterns[1].rows, batch, dtype, True) if keep else None
    kernels.apply_pair(left, right, x, out, inner, tile, transposed=transposed, block_order=block_order)

    def unfused(kind):
        factors = [left.transpose(1, 2), right.transpose(1, 2)] if transposed else [right, left]
        between = torch.empty(patterns[1].rows, batch, dtype=kind)
        result = torch.empty(rows, batch, dtype=kind)
        x_order = {"x_block_order": block_order and transposed}
        batched.apply_factor(factors[0].to(kind), x.to(kind), between, **x_order)
        batched.apply_factor(factors[1].to(kind), between, result, out_block_order=block_order and not transposed)
        return result, between

    plain, exact = unfused(dtype), unfused(torch.float64)
    assert_as_exact_as_plain(*(y.reshape(-1, 4, batch) for y in (out, plain[0], exact[0])), (1, 2))
    if keep:
        assert_as_exact_as_plain(*(z.unsqueeze(0) for z in (inner, plain[1], exact[1])), (1, 2))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_factor(kernels, pattern, dtype, layouts, transposed):
    for block_order in (False, True):
        check_factor(kernels, pattern, dtype, *layouts, block_order=block_order, transposed=transposed)


@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_gradient(kernels, pattern, dtype, layouts):
    for block_order in (False, True):
        check_values_gradient(kernels, pattern, dtype, *layouts, block_order=block_order)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patterns", CHAINS, ids=str)
def test_pair(kernels, patterns, dtype, layout, transposed):
    for block_order, keep in LAYOUTS:
        check_pair(kernels, patterns, dtype, layout, keep=keep, block_order=block_order, transposed=transposed)


@pytest.mark.parametrize("batch", [1, 16, 33, 200])
def test_any_batch(kernels, batch):
    pattern = PATTERNS[0]
    check_factor(kernels, pattern, torch.float32, False, False, batch)
    check_values_gradient(kernels, pattern, torch.float32, False, False, batch)
    check_pair(kernels, CHAINS[0], torch.float32, False, batch)


def test_a_batch_in_parts_is_summed_whole_and_always_alike(kernels, monkeypatch):
    pattern = PATTERNS[0]
    parts = tiles.Tiles(16, 16, 16, group=4, parts=3)
    monkeypatch.setattr(tiles, "gradient_tiles", lambda *_: parts)
    check_values_gradient(kernels, pattern, torch.float32, False, True, batch=100)
    check_values_gradient(kernels, pattern, torch.float16, False, True, batch=33)
    gradient, x = (random_matrix(size, 100, torch.float32, True) for size in (pattern.rows, pattern.cols))
    results = [batched.empty_values(pattern) for _ in range(2)]
    for out in results:
        kernels.values_gradient(gradient, x, out)
    assert torch.equal(*results)


FAMILIES = [(24, 36, "monarch", 3), (7, 13, "monarch", 2), (24, 40, "lowrank", 5), (24, 40, "butterfly", 2)]
FAMILIES += [(16, 16, "lowrank_butterfly", 1)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_the_whole_chain_and_its_gradients(kernels, case, batch_last, fused, monkeypatch):
    rows, cols, family, rank = case
    if fused:
        tile = tiles.Tiles(16, 16, 16, rank=16)
        monkeypatch.setattr(tiles, "pair_tiles", lambda left, right, *_: tile if right.a in (1, 4) else None)
    patterns = make_chain(rows, cols, family).patterns(rank)
    values = [random_values(p, torch.float64, seed=i).requires_grad_() for i, p in enumerate(patterns)]
    x = torch.randn(3, 5, cols, dtype=torch.float64, requires_grad=True)
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


def test_gradcheck(kernels):
    values = [random_values(p, torch.float64).requires_grad_() for p in make_chain(8, 12).patterns(2)]
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *values: chain_product(x, list(values), impl="triton"), (x, *values))


def test_block_order_and_empty_batches(kernels):
    values = [random_values(p, torch.float32) for p in make_chain(24, 36).patterns(3)]
    settings = (False, True, "triton", "ieee")
    for batch in (0, 5):
        x = torch.randn(batch, 36)
        y, *inner = chain_forward(x, values, *settings)
        plain, *_ = chain_forward(x, values, False, True, "bmm")
        torch.testing.assert_close(y, plain)
        gradients = chain_backward(y, x, values, inner, *settings)
        expected = chain_backward(y, x, values, inner, False, True, "bmm")
        for mine, other in zip(gradients, expected):
            torch.testing.assert_close(mine, other)


def test_the_interpreter_may_be_asked_for():
    what = (torch.device("cpu"), (Pattern(1, 2, 2, 1),), 4, torch.float32)
    assert choose_impl("triton", *what) == ("triton", "as asked")
    assert choose_impl("auto", *what)[0] == "bmm"


FAULTS = {
    "factor: 1% in one of the grouped t": (
        "results = results + (sums[g].to(y.dtype.element_ty),)",
        "results = results + ((sums[g] * (1.01 if g == 1 else 1.0)).to(y.dtype.element_ty),)",
        check_factor,
    ),
    "factor: 1% in the last tile of k": (
        "tile = _matrix(values + g * v_t, k, c, v_k, j, b, v_j)",
        "tile = _matrix(values + g * v_t, k, c, v_k, j, b, v_j) "
        "* tl.where(k[:, None] < 32, 1.0, 1.01).to(x.dtype.element_ty)",
        check_factor,
    ),
    "values gradient: 1% of the first samples": (
        "rows = tl.trans(gradient_tiles[g])",
        "rows = tl.trans(gradient_tiles[g]) * tl.where(n[None, :] < 16, 1.01, 1.0).to(x.dtype.element_ty)",
        check_values_gradient,
    ),
    "pair: 1% of the inner activation": (
        "z = z + (sums[u * OUT_BLOCKS + w].to(x.dtype.element_ty),)",
        "z = z + ((sums[u * OUT_BLOCKS + w] * (1.01 if u == 0 else 1.0)).to(x.dtype.element_ty),)",
        check_pair,
    ),
    "pair: 1% of one block of outputs": (
        "results = results + (total.to(y.dtype.element_ty),)",
        "results = results + ((total * (1.01 if w == 3 else 1.0)).to(y.dtype.element_ty),)",
        check_pair,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_of_one_percent_is_found(kernels, fault, dtype, tmp_path):
    old, new, check = FAULTS[fault]
    source = (ROOT / "ks" / "kernels.py").read_text()
    assert source.count(old) == 1
    faulty = tmp_path / "faulty_kernels.py"
    faulty.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty_kernels", faulty)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = CHAINS[0] if check is check_pair else PATTERNS[0]
    layouts = (False,) if check is check_pair else (False, False)
    check(kernels, case, dtype, *layouts)
    with pytest.raises(AssertionError, match="times what is allowed"):
        check(module, case, dtype, *layouts)
