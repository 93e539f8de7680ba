"""Floors and factorisations against independent truth."""

import random
from math import prod

import numpy as np
import pytest
import torch

import ks
from ks.factorize import (
    factorize,
    floor_curve,
    loss_floor,
    population_loss,
    sampled_loss_range,
    split_blocks,
    tail_energies,
)
from ks.patterns import Chain, chainability, patterns_of_ranks
from ks.reference import chain_to_dense

SEEDS = range(40)


def random_chain(seed, length=None):
    generator = random.Random(seed)
    length = length or generator.randint(2, 4)
    rows, cols = ([generator.randint(1, 5) for _ in range(length)] for _ in range(2))
    return Chain("explicit", prod(rows), prod(cols), tuple(rows), tuple(cols))


def random_weight(chain, seed=0):
    return torch.randn(chain.rows, chain.cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(weight, values):
    return ((weight - chain_to_dense(values)).square().sum() / len(weight)).item()


def test_split_blocks_are_those_of_the_definition():
    chain = Chain("explicit", 12, 30, (2, 3, 2), (5, 2, 3))
    weight = random_weight(chain)
    for split in (1, 2):
        height, outer, inner, width = chain.block_shape(split)
        blocks = split_blocks(weight, chain, split)
        assert blocks.shape == (outer, inner, height, width)
        for t in range(outer):
            for i in range(inner):
                assert torch.equal(blocks[t, i], weight[t::outer, i * width : (i + 1) * width])


@pytest.mark.parametrize("shape", [(3, 4, 7), (3, 7, 4), (1, 5, 5), (4, 1, 6)])
def test_tail_energies_are_sums_of_squared_singular_values(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    squares = torch.linalg.svdvals(matrices).square()
    expected = [squares[:, rank:].sum().item() for rank in range(min(shape[1:]) + 1)]
    torch.testing.assert_close(tail_energies(matrices), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_are_ordered_and_the_upper_one_is_the_factorisations_true_error(seed):
    chain = random_chain(seed)
    weight = random_weight(chain, seed)
    for rank in (1, 2, 3, 50):
        (floor,) = loss_floor(weight, chain, [rank])
        values = factorize(weight, chain.patterns(rank))
        assert [tuple(factor.shape) for factor in values] == list(chain.patterns(rank))
        assert loss(weight, values) == pytest.approx(floor.upper, rel=1e-9, abs=1e-12)
        splits = range(1, chain.num_splits + 1)
        energies = [tail_energies(split_blocks(weight, chain, split)) for split in splits]
        tails = [tail[min(rank, len(tail) - 1)].item() / chain.rows for tail in energies]
        assert floor.lower == pytest.approx(max(tails), abs=1e-12)
        assert floor.upper <= sum(tails) * (1 + 1e-9) + 1e-12
        assert floor.exact or chain.num_splits > 1


@pytest.mark.parametrize("seed", range(8))
def test_no_brute_force_optimum_beats_the_lower_bound_and_two_factors_reach_it(seed):
    chain = random_chain(seed, length=2 + seed % 2)
    weight, rank = random_weight(chain, seed), 1 + seed % 3
    (floor,) = loss_floor(weight, chain, [rank])
    found = min(lbfgs(weight, chain.patterns(rank), start) for start in range(3))
    assert found >= floor.lower - 1e-10
    if floor.exact:
        assert found == pytest.approx(floor.lower, rel=1e-4, abs=1e-8)


def lbfgs(weight, patterns, seed):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(*p, dtype=torch.float64, generator=generator).requires_grad_() for p in patterns]
    eye = torch.eye(weight.shape[1], dtype=torch.float64)
    optimizer = torch.optim.LBFGS(values, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = (weight - ks.chain_product(eye, values, batch_last=True)).square().sum() / len(weight)
        value.backward()
        return value

    optimizer.step(closure)
    return closure().item()


@pytest.mark.parametrize("seed", SEEDS)
def test_an_exact_chain_of_any_ranks_is_recovered_to_machine_precision(seed):
    chain = random_chain(seed)
    generator = random.Random(1000 + seed)
    ranks = [generator.randint(1, 6) for _ in range(chain.num_splits)]
    patterns = patterns_of_ranks(chain.row_splits, chain.col_splits, ranks)
    torch.manual_seed(seed)
    weight = chain_to_dense([torch.randn(*pattern, dtype=torch.float64) for pattern in patterns])
    values = factorize(weight, patterns)
    assert (weight - chain_to_dense(values)).norm() <= 1e-12 * weight.norm()
    assert floor_curve(weight, chain)[min(max(ranks), chain.saturation_rank)] <= 1e-12 * weight.square().sum()


def test_left_factors_are_orthonormal_per_block():
    chain = Chain("explicit", 12, 30, (2, 3, 2), (5, 2, 3))
    for factor in factorize(random_weight(chain), chain.patterns(2))[:-1]:
        a, b, c, d = factor.shape
        for i in range(a):
            for t in range(d):
                columns = factor[i, :, :, t].reshape(b, -1, 2).permute(1, 0, 2)
                gram = columns.mT @ columns
                torch.testing.assert_close(gram, torch.eye(2, dtype=gram.dtype).expand_as(gram))


def hadamard(levels):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(levels):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix


def bit_reversed_real_dft(levels):
    size = 2**levels
    order = [int(format(k, f"0{levels}b")[::-1], 2) for k in range(size)]
    angles = torch.arange(size, dtype=torch.float64)[:, None] * torch.tensor(order, dtype=torch.float64)
    return torch.cos(2 * torch.pi * angles / size)


@pytest.mark.parametrize(("weight", "rank"), [(hadamard(7), 1), (bit_reversed_real_dft(7), 2)], ids=["Hadamard", "DFT"])
def test_fast_transforms_are_exact_butterflies_and_far_from_low_rank(weight, rank):
    chain = ks.make_chain(128, 128, "butterfly", num_factors=7)
    values = factorize(weight, chain.patterns(rank))
    assert (weight - chain_to_dense(values)).norm() <= 1e-13 * weight.norm()
    assert floor_curve(weight, chain)[rank] <= 1e-13 * 128
    lowrank = floor_curve(weight, ks.make_chain(128, 128, "lowrank"))
    assert lowrank[chain.parameters(rank) // 256] > 0.5 * lowrank[0]


# lazylinop 1.24 fails an assertion of its own on three factors of rank 2 and more.
@pytest.mark.parametrize("shape", [(16, 16), (24, 36), (36, 24)])
@pytest.mark.parametrize(
    ("family", "rank"), [("monarch", 1), ("monarch", 2), ("monarch", 3), ("lowrank", 4), ("butterfly", 1)]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_factorisation_agrees_with_lazylinop(shape, family, rank):
    """An independent implementation of the same left-to-right algorithm."""
    butterfly = pytest.importorskip("lazylinop.butterfly")
    chain = ks.make_chain(*shape, family)
    patterns = chain.patterns(rank)
    weight = random_weight(chain, rank)
    theirs = butterfly.ksd(weight.numpy(), butterfly.Chain([tuple(p) for p in patterns]))
    their_loss = np.square(weight.numpy() - theirs @ np.eye(shape[1])).sum() / shape[0]
    assert loss_floor(weight, chain, [rank])[0].upper == pytest.approx(their_loss, rel=1e-8)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("num_samples", [1, 20, 500])
def test_sampled_losses_lie_in_their_range(num_samples, rank):
    """2,000 samples each, also where the residual has rank one and a loss is a single squared normal variable."""
    generator = torch.Generator().manual_seed(0)
    layer = ks.KSLinear(10, 6, 2, dtype=torch.float64)
    residual = torch.randn(6, rank or 6, generator=generator).double() @ torch.randn(rank or 6, 10).double()
    low, high = sampled_loss_range(layer.to_dense() + residual, layer.factors, num_samples)
    inputs = torch.randn(2000, num_samples, 10, generator=generator, dtype=torch.float64)
    losses = (inputs @ residual.t()).square().mean((1, 2))
    expected = residual.square().sum() / 6
    assert low <= losses.min() < expected < losses.max() <= high
    # Not wider than its purpose allows: 2√(30/N) of the loss to each side at the most, and the linear term.
    assert high - low <= expected * (4 * (30 / num_samples) ** 0.5 + 60 / num_samples + 1e-6)


def test_the_population_loss_is_the_mean_over_inputs():
    torch.manual_seed(0)
    weight = torch.randn(12, 20, dtype=torch.float64)
    layer = ks.KSLinear(20, 12, rank=2, dtype=torch.float64)
    exact = population_loss(weight, layer.factors)
    x = torch.randn(200_000, 20, dtype=torch.float64)
    with torch.no_grad():
        errors = (layer(x) - x @ weight.t()).square().mean(1)
    assert abs(errors.mean().item() - exact) < 4 * errors.std().item() / len(x) ** 0.5


def test_what_has_no_floor_or_factorisation_says_why():
    weight = torch.randn(12, 20)
    with pytest.raises(ValueError, match="no floor: .* lowrank_butterfly"):
        floor_curve(weight, ks.make_chain(12, 20, "lowrank_butterfly"))
    with pytest.raises(ValueError, match="must have a = 1"):
        factorize(torch.randn(8, 8), [(2, 4, 4, 1)])
    with pytest.raises(ValueError, match="last d = 1"):
        factorize(torch.randn(8, 8), [(1, 4, 4, 2)])
    assert chainability(ks.Pattern(1, 4, 3, 4), ks.Pattern(2, 2, 4, 3)) is None
    with pytest.raises(ValueError, match="not chainable"):
        factorize(torch.randn(16, 8), [(1, 4, 3, 4), (2, 2, 1, 3), (2, 3, 4, 1)])
    with pytest.raises(ValueError, match=r"\(12, 20\): the chain is for \(20, 12\)"):
        floor_curve(weight, ks.make_chain(20, 12))
    with pytest.raises(ValueError, match="positive integer"):
        loss_floor(weight, ks.make_chain(12, 20), [0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_from_dense_compresses_to_the_floor_in_the_weights_dtype(dtype):
    weight = torch.randn(24, 36).to(dtype)
    layer = ks.KSLinear.from_dense(weight, rank=3)
    assert layer.factors[0].dtype == dtype
    floor = loss_floor(weight, ks.make_chain(24, 36), [3])[0].lower
    assert population_loss(weight, layer.factors) == pytest.approx(floor, rel=10 * torch.finfo(dtype).eps)


def test_from_linear_keeps_bias_and_stands_in_for_the_layer():
    linear = torch.nn.Linear(24, 36)
    layer = ks.KSLinear.from_linear(linear, rank=100)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-4)
    butterfly = ks.KSLinear.from_linear(linear, rank=2, chain="butterfly")
    assert len(butterfly.factors) == 3
    with pytest.raises(ValueError, match="either a rank"):
        ks.KSLinear.from_linear(linear)
