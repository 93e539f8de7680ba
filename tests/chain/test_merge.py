"""Small factors multiplied with each other: which ones, and what comes out."""

import functools
import itertools

import pytest
import torch

from ks.chain.merge import merge_factors, merge_runs, merged_pattern
from ks.chain.patterns import Pattern, make_chain
from ks.chain.reference import chain_to_dense, factor_to_dense

SHAPES = [(2048, 4096), (4096, 4096), (4096, 14336)]


def test_runs_of_small_factors_are_merged():
    assert merge_runs(make_chain(1024, 1024, "lowrank_butterfly").patterns(1)) == [(0, 6), (6, 10)]
    assert merge_runs(make_chain(1024, 2048).patterns(8)) == [(0, 1), (1, 2)]


def test_merging_never_widens_beyond_a_tile():
    for shape, rank, family in itertools.product(SHAPES, (1, 2, 4, 8), ("butterfly", "lowrank_butterfly")):
        patterns = make_chain(*shape, family).patterns(rank)
        for start, stop in merge_runs(patterns):
            merged = functools.reduce(merged_pattern, patterns[start:stop])
            assert stop == start + 1 or max(merged.b, merged.c) <= 64
            assert (merged.rows, merged.cols) == (patterns[start].rows, patterns[stop - 1].cols)


RUNS = [
    make_chain(24, 36, "butterfly").patterns(2),
    make_chain(12, 30, row_splits=(2, 3, 2), col_splits=(5, 2, 3)).patterns(2),
    make_chain(16, 16, "lowrank_butterfly").patterns(1),
    (Pattern(1, 3, 4, 6), Pattern(2, 4, 5, 3)),
]


@pytest.mark.parametrize("patterns", RUNS, ids=str)
def test_merged_factors_are_the_dense_product(patterns):
    values = [torch.randn(*pattern, dtype=torch.float64) for pattern in patterns]
    merged = functools.reduce(merge_factors, values)
    assert tuple(merged.shape) == functools.reduce(merged_pattern, patterns)
    torch.testing.assert_close(factor_to_dense(merged), chain_to_dense(values))
