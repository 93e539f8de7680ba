"""The factorisation of a weight, its loss and the singular values behind it against independent truth."""

import random
import sys

import numpy as np
import pytest
import torch
from chains import SEEDS, random_chain, random_weight

import ks
from ks.bounds import tails
from ks.bounds.factorize import factorize
from ks.bounds.floors import floor_curve, loss_floor
from ks.bounds.tails import tail_energies
from ks.chain.patterns import chainability, patterns_of_ranks
from ks.chain.reference import chain_to_dense
from ks.errors import UsageError


@pytest.mark.parametrize("group", [1, 50, 200, 2**22])
@pytest.mark.parametrize("shape", [(7, 5), (6, 7, 5), (1, 5, 7), (2, 3, 5, 7)])
def test_tail_energies_are_sums_of_squared_singular_values_in_groups_of_any_size(shape, group, monkeypatch):
    monkeypatch.setattr(tails, "GROUP_VALUES", group)
    matrices = torch.randn(shape, dtype=torch.float64)
    singular = torch.linalg.svdvals(matrices).square().reshape(-1, 5).sum(0)
    expected = torch.cat([singular.flip(0).cumsum(0).flip(0), singular.new_zeros(1)])
    for strided in (matrices, matrices.mT.contiguous().mT):
        torch.testing.assert_close(tail_energies(strided), expected)


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


# lazylinop 1.24 fails an assertion of its own on three factors of rank 2 and more.
@pytest.mark.parametrize("shape", [(24, 36), (36, 24)])
@pytest.mark.parametrize(("family", "rank"), [("monarch", 3), ("lowrank", 4), ("butterfly", 1)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_factorisation_agrees_with_lazylinop(shape, family, rank):
    """An independent implementation of the same left-to-right algorithm."""
    limit = sys.getrecursionlimit()
    butterfly = pytest.importorskip("lazylinop.butterfly")
    sys.setrecursionlimit(limit)  # lazylinop raises it so far that a deeply nested file overflows the stack elsewhere
    chain = ks.make_chain(*shape, family)
    patterns = chain.patterns(rank)
    weight = random_weight(chain, rank)
    theirs = butterfly.ksd(weight.numpy(), butterfly.Chain([tuple(p) for p in patterns]))
    their_loss = np.square(weight.numpy() - theirs @ np.eye(shape[1])).sum() / shape[0]
    assert loss_floor(weight, chain, [rank])[0].upper == pytest.approx(their_loss, rel=1e-8)


def test_what_has_no_factorisation_says_why():
    with pytest.raises(UsageError, match="must have a = 1"):
        factorize(torch.randn(8, 8), [(2, 4, 4, 1)])
    with pytest.raises(UsageError, match="last d = 1"):
        factorize(torch.randn(8, 8), [(1, 4, 4, 2)])
    assert chainability(ks.Pattern(1, 4, 3, 4), ks.Pattern(2, 2, 4, 3)) is None
    with pytest.raises(UsageError, match="not chainable"):
        factorize(torch.randn(16, 8), [(1, 4, 3, 4), (2, 2, 1, 3), (2, 3, 4, 1)])
    with pytest.raises(UsageError, match=r"\(12, 20\): this chain needs a weight of shape \(20, 12\)"):
        factorize(torch.randn(12, 20), ks.make_chain(20, 12).patterns(2))
