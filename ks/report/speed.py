"""The chain against dense in measured time."""

import math

from ks.files.columns import BATCHES

AS_FAST = 0.95  # a chain counts as faster below this fraction of dense's time: closer ratios are noise


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
