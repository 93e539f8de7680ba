"""The chain product against the dense product of its factors, and its derivatives."""

import random

import pytest
import torch
from kernel_cases import random_chain

from ks.chain.merge import MERGE_BATCH, merge_runs
from ks.chain.patterns import Pattern, check_patterns, make_chain
from ks.chain.product import ChainLayout, blocks_of, chain_product, empty_blocks, multiply, values_of
from ks.chain.reference import chain_to_dense, factor_to_dense, support
from ks.errors import UsageError
from ks.layer import KSLinear


def test_the_reference_fills_exactly_the_kronecker_support():
    pattern = Pattern(2, 3, 4, 5)
    dense = factor_to_dense(torch.rand(*pattern) + 1)
    assert torch.equal((dense != 0).double(), support(pattern))


def test_the_reference_places_values_where_the_formula_says():
    a, b, c, d = pattern = Pattern(2, 3, 4, 5)
    values = torch.rand(*pattern)
    dense = factor_to_dense(values)
    for i, j, k, t in [(0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 3)]:
        assert dense[i * b * d + j * d + t, i * c * d + k * d + t] == values[i, j, k, t]


def random_patterns(rng):
    """A chain of any family with sides that may be 1, prime or no power of two; or two factors that meet anyhow."""
    if rng.random() < 0.8:
        return random_chain(rng).patterns(rng.choice([1, 2, 3, 5, 17, 100]))

    def divisor(number):
        return rng.choice([k for k in range(1, number + 1) if number % k == 0])

    left = Pattern(*(rng.randint(1, 4) for _ in range(4)))
    a = divisor(left.cols)
    d = divisor(left.cols // a)
    return check_patterns([left, (a, left.cols // a // d, rng.randint(1, 4), d)])


BATCH_SHAPES = [(3,), (1,), (2, 3), (), (0,), (2, 0), (MERGE_BATCH,)]


@pytest.mark.parametrize("first", range(0, 400, 40))
def test_random_chains_equal_the_dense_product(first):
    for seed in range(first, first + 40):
        rng = random.Random(seed)
        patterns, batch_shape, batch_last = random_patterns(rng), rng.choice(BATCH_SHAPES), rng.random() < 0.5
        values = [torch.randn(*pattern, dtype=torch.float64) * pattern.c**-0.5 for pattern in patterns]
        dense = chain_to_dense(values)
        x = torch.randn(*batch_shape, dense.shape[1], dtype=torch.float64)
        bias = torch.randn(len(dense), dtype=torch.float64) if rng.random() < 0.5 else None
        expected = torch.nn.functional.linear(x, dense, bias)
        y = chain_product(x.movedim(-1, 0) if batch_last else x, values, batch_last, bias=bias)
        assert y.is_contiguous()
        torch.testing.assert_close(y.movedim(0, -1) if batch_last else y, expected, atol=1e-10, rtol=1e-9)
        if patterns[0].a != 1 or patterns[-1].d != 1:
            continue
        for blocks_in, blocks_out in ((True, False), (False, True), (True, True)):
            layout = ChainLayout(tuple(patterns), (), batch_last, blocks_in, blocks_out)
            given = x.unflatten(-1, (patterns[-1].a, -1 if x.numel() else patterns[-1].c)) if blocks_in else x
            features = (-2, -1) if blocks_in else (-1,)
            given = given.movedim(features, tuple(range(len(features)))) if batch_last else given
            y = multiply(given, [blocks_of(factor) for factor in values], layout, bias)
            if batch_last:
                y = y.movedim((0, 1), (-2, -1)) if blocks_out else y.movedim(0, -1)
            y = y.mT.flatten(-2) if blocks_out else y
            torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-9)


FAMILIES = ["monarch", "butterfly", "lowrank", "lowrank_butterfly"]


def make_values(family, dtype=torch.float64, rows=12, cols=20, rank=2):
    torch.manual_seed(0)
    patterns = make_chain(rows, cols, family).patterns(rank)
    return [(torch.randn(*p) * p.c**-0.5).to(dtype).requires_grad_() for p in patterns]


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_at_most_twice_that_of_plain_torch(family, dtype, batch_last):
    """Per block of the output, against float64; plain torch multiplies the same factors as dense matrices."""
    values = make_values(family, dtype, 24, 40, 3)
    x = torch.randn(33, 40).to(dtype)
    exact = plain = x.t()
    exact = exact.double()
    for factor in reversed(values):
        dense = factor_to_dense(factor.detach())
        exact, plain = dense.double() @ exact, dense @ plain
    with torch.no_grad():
        ours = chain_product(x.t() if batch_last else x, values, batch_last)
    ours = ours if batch_last else ours.t()
    for block in torch.arange(24).split(4):
        norm = exact[block].norm()
        plain_error, our_error = ((y[block].double() - exact[block]).norm() / norm for y in (plain, ours))
        assert our_error <= 2 * plain_error + torch.finfo(dtype).eps


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_and_second_derivatives(family, batch_last):
    values = make_values(family, rows=4, cols=8)
    inputs = (torch.randn((8, 3) if batch_last else (3, 8)).double().requires_grad_(), torch.randn(4).double(), *values)

    def function(x, bias, *values):
        return chain_product(x, values, batch_last, bias=bias)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_large_batch_of_small_factors_is_differentiable_too():
    values = make_values("lowrank_butterfly", rows=16, cols=16)
    x = torch.randn(MERGE_BATCH, 16, dtype=torch.float64, requires_grad=True)
    assert len(merge_runs(tuple(Pattern(*factor.shape) for factor in values))) < len(values)
    upstream = torch.randn(MERGE_BATCH, 16, dtype=torch.float64)
    ours = torch.autograd.grad(chain_product(x, values), [x, *values], upstream)
    theirs = torch.autograd.grad(x @ chain_to_dense(values).t(), [x, *values], upstream)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_gradients_with_any_strides(family, batch_last):
    values = make_values(family)
    x = torch.randn(20, 10, dtype=torch.float64)[:, ::2].t().requires_grad_()
    y = chain_product(x.t() if batch_last else x, values, batch_last)
    torch.testing.assert_close(y.t() if batch_last else y, x @ chain_to_dense(values).t())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, chain_to_dense(values).sum(0).expand(5, -1))


def test_gradients_of_blocks_are_contiguous_and_those_that_are_asked_for():
    layer = KSLinear(24, 36, rank=3)
    layer.block_0.requires_grad_(False)
    layer(torch.randn(5, 24)).sum().backward()
    assert layer.block_0.grad is None
    assert layer.block_1.grad.is_contiguous()


def test_values_and_blocks_are_views_of_each_other():
    pattern = Pattern(2, 3, 4, 5)
    blocks = empty_blocks(pattern).normal_()
    values = values_of(blocks, pattern)
    assert values.shape == pattern
    assert blocks_of(values).data_ptr() == blocks.data_ptr()
    assert torch.equal(blocks_of(values.contiguous()), blocks)


def test_bad_arguments_are_named():
    values = make_values("monarch")
    with pytest.raises(UsageError, match=r"\(5, 19\): the last dimension must be 20"):
        chain_product(torch.randn(5, 19, dtype=torch.float64), values)
    with pytest.raises(UsageError, match="the first dimension must be 20"):
        chain_product(torch.randn(5, 20, dtype=torch.float64), values, batch_last=True)
    with pytest.raises(UsageError, match="the last dimension must be 20"):
        chain_product(torch.tensor(1.0, dtype=torch.float64), values)
    with pytest.raises(UsageError, match="convert one of them"):
        chain_product(torch.randn(5, 20), values)
    with pytest.raises(UsageError, match="need a CUDA device"):
        chain_product(torch.randn(5, 20, dtype=torch.float64), values, impl="triton")
