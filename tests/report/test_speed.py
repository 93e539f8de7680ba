import math

from ks.report.speed import listed, measured_batches, not_faster


def row(rank, **times):
    """Return a row with (chain, dense) milliseconds at batch_1, batch_32 or batch_1024."""
    found = {"rank": rank}
    for name, (chain, dense) in times.items():
        found |= {f"latency_ms_{name}": chain, f"dense_latency_ms_{name}": dense}
    return found


def test_a_chain_is_faster_only_by_more_than_the_noise():
    rows = [row(2, batch_1=(0.9, 1.0), batch_32=(0.96, 1.0)), row(4, batch_1=(0.9, 1.0), batch_32=(0.1, 1.0))]
    assert not_faster(rows) == "not faster than dense: rank 2 at batch 32"


def test_what_is_not_measured_is_not_slow():
    rows = [row(2), row(4, batch_1=(math.nan, math.nan), batch_32=(None, None))]
    assert measured_batches(rows) == []
    assert not_faster(rows) == ""


def test_chains_slower_than_dense_say_so_by_batch_size():
    rows = [row(2, batch_1=(2.0, 1.0)), row(64, batch_1=(0.1051, 0.099), batch_1024=(2.0, 1.0))]
    assert not_faster(rows) == "not faster than dense: every rank at batch 1; rank 64 at batch 1024"


def test_many_ranks_are_counted():
    assert listed([2], 6) == "rank 2"
    assert listed([2, 4, 8], 6) == "ranks 2, 4 and 8"
    assert listed([1, 2, 3, 4, 5], 6) == "5 of 6 ranks"
    assert listed([1, 2], 2) == "every rank"
