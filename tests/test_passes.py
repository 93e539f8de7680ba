"""The passes of a chain against the dense reference, over random sizes on both sides of every threshold.

Whatever is merged, fused or left in block order, y and every gradient must be those of W, in the order that
`output_rows` promises.
"""

import pytest
from kernel_cases import check_passes, random_case

from ks import tiles
from ks.patterns import make_chain


@pytest.mark.parametrize("first", range(0, 400, 40))
def test_random_chains_equal_the_dense_product(first):
    for seed in range(first, first + 40):
        check_passes(*random_case(seed))


def test_the_draws_reach_merged_and_unmerged_chains_in_both_orders():
    reached = set()
    for seed in range(400):
        patterns, batch, _, block_order = random_case(seed)
        reached.add((len(tiles.merge_runs(patterns, batch)) < len(patterns), block_order, batch >= tiles.MERGE_BATCH))
    assert reached >= {(True, True, True), (True, False, True), (False, True, True), (False, True, False)}


@pytest.mark.parametrize("batch", [255, 256, 1000])
@pytest.mark.parametrize(
    "chain",
    [
        make_chain(64, 64),
        make_chain(512, 512, "butterfly", num_factors=9),
        make_chain(256, 256, "butterfly", num_factors=5),
    ],
    ids=lambda chain: chain.describe(),
)
@pytest.mark.parametrize("batch_last", [False, True])
def test_chains_whose_left_factors_are_merged_keep_their_promised_order(chain, batch, batch_last):
    check_passes(chain.patterns(1), batch, batch_last, block_order=True)
    check_passes(chain.patterns(2), batch, batch_last, block_order=True)
