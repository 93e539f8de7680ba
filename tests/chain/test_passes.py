"""The passes of a chain, and Gram matrices at its splits that multiply gradients, against dense matrices in float64."""

import itertools
from math import prod

import pytest
import torch
from kernel_cases import check_passes

from ks.chain.bmm import empty_values
from ks.chain.passes import ChainPasses
from ks.chain.patterns import make_chain
from ks.chain.reference import factor_to_dense
from ks.chain.split_grams import (
    SplitMatrices,
    is_chainable,
    prefix_grams,
    scale_gradient,
    split_patterns,
    suffix_grams,
)

CHAINS = [
    ((7, 1), (1, 9), 3),
    ((8, 2), (3, 6), 2),
    ((5, 3), (2, 4), 1),
    ((6, 2, 3), (2, 3, 4), 3),
    ((4, 3, 1, 2), (1, 2, 3, 4), 3),
    ((4, 2, 2, 2), (2, 2, 2, 5), 2),
]


def patterns_of(chain):
    rows, cols, rank = chain
    return make_chain(prod(rows), prod(cols), row_splits=rows, col_splits=cols).patterns(rank)


def random_values(patterns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [empty_values(p, dtype=torch.float64).normal_(generator=generator) for p in patterns]


def symmetric(patterns, seed):
    values = random_values(split_patterns(patterns), seed)
    return [matrices + matrices.transpose(1, 2) for matrices in values]


@pytest.mark.parametrize("chain", CHAINS)
def test_grams_are_the_diagonal_blocks_of_the_dense_ones(chain):
    patterns = patterns_of(chain)
    values = random_values(patterns)
    dense = [factor_to_dense(factor) for factor in values]
    prefixes = list(itertools.accumulate(dense, torch.matmul))[:-1]
    suffixes = list(itertools.accumulate(dense[::-1], lambda product, left: left @ product))[-2::-1]
    for split, pattern in enumerate(split_patterns(patterns)):
        support = factor_to_dense(torch.ones(pattern, dtype=torch.float64))
        before, after = prefix_grams(values)[split], suffix_grams(values)[split]
        assert before.shape == after.shape == pattern
        prefix, suffix = prefixes[split], suffixes[split]
        torch.testing.assert_close(factor_to_dense(before), prefix.t() @ prefix * support)
        torch.testing.assert_close(factor_to_dense(after), suffix @ suffix.t() * support)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_gradient_is_scaled_from_both_sides(chain):
    patterns = patterns_of(chain)
    matrices = SplitMatrices(symmetric(patterns, 1), symmetric(patterns, 2))
    for index, gradient in enumerate(random_values(patterns)):
        left, right = matrices.beside(index)
        expected = factor_to_dense(gradient)
        expected = expected if left is None else factor_to_dense(left) @ expected
        expected = expected if right is None else expected @ factor_to_dense(right)
        torch.testing.assert_close(factor_to_dense(scale_gradient(gradient, left, right)), expected)


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_the_passes_of_random_chains_are_those_of_the_dense_product(first):
    for seed in range(first, first + 40):
        check_passes(seed)


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("block_order", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 30])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_backward_pass_returns_scaled_gradients(chain, batch, block_order, batch_last):
    """By multiplied activations (small batches) or gradients."""
    patterns = patterns_of(chain)
    values = random_values(patterns)
    passes = ChainPasses(patterns, batch_last=batch_last, block_order=block_order)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(batch, patterns[-1].cols, dtype=torch.float64, generator=generator)
    x = x.t().contiguous() if batch_last else x
    y, *inner = passes.forward(x, values)
    gradient = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    matrices = SplitMatrices(symmetric(patterns, 1), symmetric(patterns, 2))
    plain = passes.backward(gradient, x, values, inner)
    scaled = passes.backward(gradient, x, values, inner, scaling=matrices)
    for index, (found, raw) in enumerate(zip(scaled, plain, strict=True)):
        torch.testing.assert_close(found, scale_gradient(raw, *matrices.beside(index)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_gradients_of_half_precision_are_as_precise_as_the_activations(dtype):
    """An inverse in half precision would not be positive definite."""
    patterns = patterns_of(CHAINS[1])
    passes = ChainPasses(patterns)
    values = [factor.to(dtype) for factor in random_values(patterns)]
    x = torch.randn(4, patterns[-1].cols, generator=torch.Generator().manual_seed(4)).to(dtype)
    y, *inner = passes.forward(x, values)
    matrices = SplitMatrices(*([m.float() for m in symmetric(patterns, seed)] for seed in (1, 2)))
    out = [empty_values(pattern) for pattern in patterns]
    passes.backward(y, x, values, inner, out=out, scaling=matrices)
    left, right = values
    arrived = factor_to_dense(left.float()).t() @ y.float().t()
    arrived = arrived.to(dtype).float()  # the backward pass itself is in half precision
    raw = torch.zeros_like(out[1])
    for i in range(right.shape[0]):
        rows = arrived.view(right.shape[0], right.shape[1], 4)[i]
        raw[i, :, :, 0] = rows @ x.float().view(4, right.shape[0], -1)[:, i]
    torch.testing.assert_close(out[1], scale_gradient(raw, *matrices.beside(1)), rtol=2e-2, atol=2e-1)


def test_the_splits_of_a_chain_that_is_not_chainable_have_no_matrices():
    assert all(is_chainable(patterns_of(chain)) for chain in CHAINS)
    assert not is_chainable(make_chain(6, 10, "lowrank_butterfly").patterns(2))
    assert is_chainable(make_chain(8, 8, "lowrank_butterfly").patterns(2))
