"""The passes of a chain against the dense reference, over random sizes, layouts and orders."""

import pytest
from kernel_cases import check_passes


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_random_chains_equal_the_dense_product(first):
    for seed in range(first, first + 40):
        check_passes(seed)
