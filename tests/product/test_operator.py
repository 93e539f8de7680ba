"""The differentiable chain product against dense products of explicit factors."""

import pytest
import torch

from ks.errors import UsageError
from ks.patterns import Pattern, make_chain
from ks.product.bmm import empty_values
from ks.product.operator import chain_product
from ks.product.reference import chain_to_dense, factor_to_dense, support

# Odd, rectangular, prime and non-power-of-two shapes; a = 1, d = 1 and both larger than 1; ranks above saturation.
CASES = [
    (24, 36, "monarch", 3),
    (24, 36, "monarch", 100),
    (7, 13, "monarch", 2),
    (15, 21, "monarch", 1),
    (24, 40, "lowrank", 5),
    (24, 40, "butterfly", 2),
    (12, 20, "lowrank_butterfly", 3),
    (16, 16, "lowrank_butterfly", 1),
]


def make_values(rows, cols, family, rank, dtype=torch.float64, stored="internal"):
    generator = torch.Generator().manual_seed(rank)
    values = []
    for pattern in make_chain(rows, cols, family).patterns(rank):
        factor = empty_values(pattern) if stored == "internal" else torch.empty(*pattern)
        factor.normal_(generator=generator)
        values.append((factor * pattern.c**-0.5).to(dtype).requires_grad_())
    return values


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


@pytest.mark.parametrize("stored", ["internal", "contiguous"])
@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_every_gradient_equal_the_dense_product(case, batch_last, stored):
    values = make_values(*case, stored=stored)
    cols = case[1]
    x = torch.randn(3, 5, cols, dtype=torch.float64, requires_grad=True)
    y = chain_product(x.movedim(-1, 0) if batch_last else x, values, batch_last)
    y = y.movedim(0, -1) if batch_last else y
    expected = x @ chain_to_dense(values).t()
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(expected)
    ours = torch.autograd.grad(y, [x, *values], gradient)
    theirs = torch.autograd.grad(expected, [x, *values], gradient)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rounding_is_at_most_twice_that_of_plain_torch(case, dtype, batch_last):
    """Per block of the output, against float64; plain torch multiplies the same factors as dense matrices."""
    rows, cols, family, rank = case
    values = make_values(*case, dtype=dtype)
    x = torch.randn(33, cols).to(dtype)
    dense = [factor_to_dense(factor.detach()) for factor in values]
    exact = x.double().t()
    plain = x.t()
    for factor in reversed(dense):
        exact, plain = factor.double() @ exact, factor @ plain
    with torch.no_grad():
        ours = chain_product(x.t() if batch_last else x, values, batch_last)
    ours = ours if batch_last else ours.t()
    for block in torch.arange(rows).tensor_split(max(1, rows // 4)):
        norm = exact[block].norm()
        plain_error = (plain[block].double() - exact[block]).norm() / norm
        our_error = (ours[block].double() - exact[block]).norm() / norm
        assert our_error <= 2 * plain_error + torch.finfo(dtype).eps


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("family", ["monarch", "butterfly", "lowrank"])
def test_gradcheck(family, batch_last):
    values = make_values(8, 12, family, 2)
    x = torch.randn((12, 3) if batch_last else (3, 12), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *values: chain_product(x, list(values), batch_last), (x, *values))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("batch_last", [False, True])
def test_any_batch_shape(shape, batch_last):
    values = make_values(24, 36, "monarch", 3)
    x = torch.randn(*shape, 36, dtype=torch.float64)
    y = chain_product(x.movedim(-1, 0) if batch_last else x, values, batch_last)
    assert y.shape == ((24, *shape) if batch_last else (*shape, 24))
    assert y.is_contiguous()
    torch.testing.assert_close(y.movedim(0, -1) if batch_last else y, x @ chain_to_dense(values).t())


def test_non_contiguous_inputs_and_expanded_gradients():
    values = make_values(24, 36, "monarch", 3)
    x = torch.randn(36, 10, dtype=torch.float64)[:, ::2].t().requires_grad_()
    y = chain_product(x, values)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, chain_to_dense(values).sum(0).expand(5, -1))


def test_only_the_gradients_that_are_asked_for():
    values = make_values(24, 36, "monarch", 3)
    values[0].requires_grad_(False)
    x = torch.randn(5, 36, dtype=torch.float64)
    chain_product(x, values).sum().backward()
    assert values[0].grad is None
    assert values[1].grad is not None


def test_gradients_lie_in_memory_as_the_values_do():
    values = make_values(24, 36, "monarch", 3)
    chain_product(torch.randn(5, 36, dtype=torch.float64), values).sum().backward()
    assert all(factor.grad.stride() == factor.stride() for factor in values)


def test_autocast_runs_in_half_precision_with_float32_gradients():
    values = make_values(24, 36, "monarch", 3, dtype=torch.float32)
    x = torch.randn(5, 36)
    with torch.autocast("cpu", torch.bfloat16):
        y = chain_product(x, values)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert values[0].grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), x @ chain_to_dense(values).t(), atol=0.05, rtol=0.05)


def test_bad_arguments_are_named():
    values = make_values(24, 36, "monarch", 3)
    with pytest.raises(UsageError, match=r"\(5, 35\): the last dimension must be 36"):
        chain_product(torch.randn(5, 35, dtype=torch.float64), values)
    with pytest.raises(UsageError, match="first dimension must be 36"):
        chain_product(torch.randn(5, 36, dtype=torch.float64), values, batch_last=True)
    with pytest.raises(UsageError, match="convert one of them"):
        chain_product(torch.randn(5, 36), values)
