"""The chain against dense in measured time."""

import math

from ks.files.columns import BATCHES

AS_FAST = 0.95  # share of dense's time from which on a chain is not called faster: closer ratios are noise


def times_of(row: dict, batch: int) -> tuple[float, float] | None:
    """Return the milliseconds of chain and dense at a batch size; None if they are not known.

    Args:
        row: of the summary.
        batch: size.
    """
    chain, dense = (row.get(f"{kind}latency_ms_batch_{batch}") for kind in ("", "dense_"))
    if chain is None or dense is None or not math.isfinite(chain + dense):
        return None
    return chain, dense


def measured_batches(rows: list[dict]) -> list[int]:
    """Return the batch sizes at which the latency of a rank is known."""
    return [batch for batch in BATCHES if any(times_of(row, batch) for row in rows)]


def slow_batches(row: dict) -> list[int]:
    """Return the batch sizes at which a chain is not faster than dense."""
    times = {batch: times_of(row, batch) for batch in BATCHES}
    return [batch for batch, pair in times.items() if pair and pair[0] > AS_FAST * pair[1]]


def speed_remarks(rows: list[dict]) -> list[str]:
    """Return which ranks are not faster than dense, a sentence for each; rows are those of the summary."""
    remarks = []
    for row in rows:
        texts = []
        for batch in slow_batches(row):
            chain, dense = times_of(row, batch) or (math.nan, math.nan)
            texts.append(f"batch {batch} ({chain:.3g} ms against {dense:.3g} ms)")
        if texts:
            remarks.append(f"rank {row['rank']}: not faster than dense at {', '.join(texts)}")
    return remarks
