import math

from ks.report.speed import measured_batches, slow_batches, speed_remarks


def row(rank, **times):
    """Return a row with (chain, dense) milliseconds at batch_1, batch_32 or batch_1024."""
    found = {"rank": rank}
    for name, (chain, dense) in times.items():
        found |= {f"latency_ms_{name}": chain, f"dense_latency_ms_{name}": dense}
    return found


def test_a_chain_is_faster_only_by_more_than_the_noise():
    assert slow_batches(row(2, batch_1=(0.9, 1.0), batch_32=(0.96, 1.0), batch_1024=(3.0, 1.0))) == [32, 1024]


def test_what_is_not_measured_is_not_slow():
    rows = [row(2), row(4, batch_1=(math.nan, math.nan), batch_32=(None, None))]
    assert measured_batches(rows) == [] == speed_remarks(rows)


def test_a_chain_slower_than_dense_says_so():
    rows = [row(2, batch_1=(0.1, 1.0)), row(64, batch_1=(0.1051, 0.099), batch_32=(2.0, 1.0))]
    assert speed_remarks(rows) == [
        "rank 64: not faster than dense at batch 1 (0.105 ms against 0.099 ms), batch 32 (2 ms against 1 ms)"
    ]
