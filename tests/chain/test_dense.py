"""Chains multiplied out by blocks, against the specification."""

import pytest
import torch

from ks.chain import dense
from ks.chain.patterns import make_chain
from ks.chain.reference import chain_to_dense

CHAINS = {
    "monarch": make_chain(12, 20, "monarch"),
    "lowrank": make_chain(12, 20, "lowrank"),
    "partly low-rank": make_chain(7, 20, "monarch"),
    "three factors": make_chain(24, 40, "butterfly"),
    "four factors": make_chain(32, 16, "butterfly", num_factors=4),
    "blocks of one value": make_chain(6, 8, row_splits=(1, 6), col_splits=(8, 1)),
    "uneven": make_chain(30, 24, row_splits=(5, 3, 2), col_splits=(2, 3, 4)),
    "not chainable": make_chain(12, 20, "lowrank_butterfly"),
}


def values_of(patterns, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*pattern, generator=generator, dtype=torch.float64).to(dtype) for pattern in patterns]


@pytest.mark.parametrize("rank", [1, 3, 100])
@pytest.mark.parametrize("piece", [1, 40, 2**18])
@pytest.mark.parametrize("name", CHAINS)
def test_every_family_is_multiplied_out(name, piece, rank, monkeypatch):
    monkeypatch.setattr(dense, "PIECE_VALUES", piece)
    monkeypatch.setattr(dense, "COLUMN_VALUES", piece)
    values = values_of(CHAINS[name].patterns(rank))
    expected = chain_to_dense(values)
    scale = expected.abs().max()
    assert (dense.dense_chain(values) - expected).abs().max() <= 1e-14 * scale
    weight = torch.randn(expected.shape, dtype=torch.float64)
    assert (dense.subtract_chain(weight.clone(), values) - (weight - expected)).abs().max() <= 1e-14 * scale


@pytest.mark.parametrize("patterns", [[(2, 3, 4, 5)], [(2, 3, 4, 1), (2, 4, 3, 1)], [(1, 3, 4, 2), (1, 4, 3, 2)]])
def test_chains_that_are_no_cut_into_blocks_are_multiplied_out(patterns):
    values = values_of(patterns)
    torch.testing.assert_close(dense.dense_chain(values), chain_to_dense(values), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_values_is_that_of_the_product(dtype):
    values = values_of(make_chain(12, 20, "monarch").patterns(2), dtype)
    product = dense.dense_chain(values)
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), chain_to_dense([v.double() for v in values]), rtol=1e-2, atol=1e-1)
