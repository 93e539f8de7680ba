import random
from itertools import pairwise
from math import prod

import pytest

from ks.chain.patterns import (
    FAMILIES,
    Chain,
    Pattern,
    chainability,
    check_patterns,
    clip_ranks,
    make_chain,
    patterns_of_ranks,
)
from ks.errors import UsageError


def random_splits(generator: random.Random) -> tuple[list[int], list[int]]:
    length = generator.randint(2, 4)
    return [generator.randint(1, 6) for _ in range(length)], [generator.randint(1, 6) for _ in range(length)]


@pytest.mark.parametrize("seed", range(300))
def test_a_random_chain_has_the_sizes_and_chainability_numbers_of_the_formula(seed):
    generator = random.Random(seed)
    rows, cols = random_splits(generator)
    wanted = [generator.randint(1, 20) for _ in rows[1:]]
    patterns = check_patterns(patterns_of_ranks(rows, cols, wanted))
    assert (patterns[0].rows, patterns[-1].cols) == (prod(rows), prod(cols))
    ranks = clip_ranks(rows, cols, wanted)
    assert [chainability(left, right) for left, right in pairwise(patterns)] == list(ranks)
    assert all(rank <= want for rank, want in zip(ranks, wanted))


@pytest.mark.parametrize("seed", range(100))
def test_uniform_ranks_are_the_clipped_uniform_request(seed):
    generator = random.Random(seed)
    rows, cols = random_splits(generator)
    chain = Chain("explicit", prod(rows), prod(cols), tuple(rows), tuple(cols))
    rank = generator.randint(1, 30)
    assert chain.ranks(rank) == clip_ranks(rows, cols, [rank] * (len(rows) - 1))
    assert chain.patterns(rank) == patterns_of_ranks(rows, cols, [rank] * (len(rows) - 1))
    assert chain.patterns(chain.saturation_rank) == chain.patterns(chain.saturation_rank + 7)


def test_known_patterns():
    assert make_chain(1024, 2048).patterns(8) == ((1, 256, 32, 4), (4, 32, 512, 1))
    assert make_chain(10, 14, "lowrank").patterns(3) == ((1, 10, 3, 1), (1, 3, 14, 1))
    assert make_chain(8, 16, "butterfly").patterns(1) == ((1, 2, 2, 4), (2, 2, 2, 2), (4, 2, 4, 1))
    assert make_chain(8, 8, "lowrank_butterfly").patterns(3) == ((1, 2, 2, 4), (2, 2, 2, 2), (4, 2, 2, 1))
    assert make_chain(6, 8, "lowrank_butterfly").patterns(3)[:2] == ((1, 6, 3, 1), (1, 3, 8, 1))


def test_parameter_counts_follow_the_closed_forms():
    chain = make_chain(1024, 2048)
    assert chain.parameters(8) == 8 * (1024 * 4 + 2048 * 4)
    assert make_chain(1024, 2048, "lowrank").parameters(5) == 5 * (1024 + 2048)
    assert make_chain(1024, 2048, "butterfly").parameters(5) == 2 * 5 * (1024 + 2048) + 16 * 25


@pytest.mark.parametrize("family", ["monarch", "lowrank", "butterfly"])
def test_parity_rank_is_the_first_that_reaches_the_dense_size(family):
    chain = make_chain(48, 80, family)
    parity = chain.parity_rank()
    assert chain.parameters(parity) >= 48 * 80 > chain.parameters(parity - 1)


def test_no_parity_where_no_rank_is_larger_than_dense():
    assert make_chain(16, 16, "lowrank_butterfly").parity_rank() is None
    assert make_chain(1, 7, "lowrank").parity_rank() == 1


def test_splits_keep_to_divisors_and_prime_sides_are_remarked():
    assert make_chain(384, 30).row_splits == (96, 4)
    assert make_chain(384, 30).col_splits == (3, 10)
    prime = make_chain(7, 13)
    assert prime.patterns(2) == make_chain(7, 13, "lowrank").patterns(2)
    assert "plain low-rank" in prime.notes()[0]
    assert "partly low-rank" in make_chain(7, 16).notes()[0]
    assert not make_chain(8, 16).notes()
    assert "no effect" in make_chain(16, 16, "lowrank_butterfly").notes()[0]


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((8, 8, "nonsense"), {}, "monarch, lowrank, butterfly, lowrank_butterfly"),
        ((12, 8, "butterfly"), {"num_factors": 4}, "or the chain monarch"),
        ((8, 8, "butterfly"), {"num_factors": 1}, "at least 2"),
        ((8, 8, "monarch"), {"blocks": 0}, "at least 1"),
        ((8, 8), {"row_splits": (4, 2)}, "go together"),
        ((8, 8), {"row_splits": (4, 3), "col_splits": (2, 4)}, "multiply to 12"),
        ((8, 8), {"row_splits": (8,), "col_splits": (8,)}, "at least two"),
        ((8, 8), {"row_splits": (-4, -2), "col_splits": (2, 4)}, "positive"),
        ((0, 8), {}, "at least 1"),
    ],
)
def test_bad_chains_are_refused_by_name(arguments, keywords, message):
    with pytest.raises(UsageError, match=message):
        make_chain(*arguments, **keywords)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_bad_ranks_are_refused(rank):
    for family in FAMILIES:
        with pytest.raises(UsageError, match="positive integer"):
            make_chain(8, 8, family).patterns(rank)


def test_bad_patterns_are_refused():
    with pytest.raises(UsageError, match="6 columns .* meet 4 rows"):
        check_patterns([(1, 2, 6, 1), (1, 4, 2, 1)])
    with pytest.raises(UsageError, match="four positive integers"):
        check_patterns([(1, 2, 0, 1)])
    with pytest.raises(UsageError, match="empty chain"):
        check_patterns([])


def test_patterns_of_equal_size_need_not_be_chainable():
    assert chainability(Pattern(2, 2, 2, 1), Pattern(1, 2, 2, 2)) is None
    assert chainability(Pattern(1, 2, 2, 2), Pattern(2, 2, 2, 1)) == 1
