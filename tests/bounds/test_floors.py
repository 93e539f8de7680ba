"""Floors against independent truth."""

import pytest
import torch
from chains import SEEDS, loss, random_chain, random_weight, trained
from measured import random_moment

import ks
from ks.bounds.factorize import factorize
from ks.bounds.floors import floor_curve, loss_floor, split_blocks
from ks.bounds.tails import tail_energies
from ks.chain.reference import chain_to_dense
from ks.errors import UsageError
from ks.moments.metric import Metric


@pytest.mark.parametrize("seed", SEEDS[:10])
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
        assert floor.lower >= max(tails) - 1e-12
        assert floor.lower == pytest.approx(max(tails), abs=1e-12) or chain.num_splits > 1
        assert floor.upper <= sum(tails) * (1 + 1e-9) + 1e-12
        assert floor.exact or chain.num_splits > 1


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_quasi_newton_method_gets_below_the_lower_bound_and_it_reaches_an_exact_one(seed, measured):
    chain = random_chain(seed, length=2 + seed % 2)
    weight, rank = random_weight(chain, seed), 1 + seed % 3
    metric = Metric(random_moment("regular", chain.cols, seed=seed) if measured else None)
    (floor,) = loss_floor(weight, chain, [rank], metric)
    found = min(trained(weight, chain.patterns(rank), metric, start, 500) for start in range(3 - 2 * measured))
    assert found >= floor.lower - 1e-10
    assert floor.exact or floor.lower > 0.02 * found
    if floor.exact:
        assert found == pytest.approx(floor.lower, rel=1e-4, abs=1e-8)


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


def test_what_has_no_floor_says_why():
    weight = torch.randn(12, 20)
    with pytest.raises(UsageError, match="no floor: .* lowrank_butterfly"):
        floor_curve(weight, ks.make_chain(12, 20, "lowrank_butterfly"))
    with pytest.raises(UsageError, match=r"\(12, 20\): this chain needs a weight of shape \(20, 12\)"):
        floor_curve(weight, ks.make_chain(20, 12))
    with pytest.raises(UsageError, match="positive integer"):
        loss_floor(weight, ks.make_chain(12, 20), [0])
    with pytest.raises(UsageError, match=r"a sequence of ranks is needed, \[16\]"):
        loss_floor(weight, ks.make_chain(12, 20), 16)
