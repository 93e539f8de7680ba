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


def listed(ranks, total: int) -> str:
    """Return 'rank 2', 'ranks 2, 4 and 8', '5 of 12 ranks' or 'every rank'."""
    names = [str(rank) for rank in ranks]
    if len(names) == 1:
        return f"rank {names[0]}"
    if len(names) == total:
        return "every rank"
    if len(names) > 4:
        return f"{len(names)} of {total} ranks"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def not_faster(rows: list[dict]) -> str:
    """Return which ranks are not faster than dense, by batch size; empty if all are, or if nothing was measured."""

    def is_slow(row: dict, batch: int) -> bool:
        times = times_of(row, batch)
        return times is not None and times[0] > AS_FAST * times[1]

    slow = {batch: [row["rank"] for row in rows if is_slow(row, batch)] for batch in measured_batches(rows)}
    texts = [f"{listed(ranks, len(rows))} at batch {batch}" for batch, ranks in slow.items() if ranks]
    return f"not faster than dense: {'; '.join(texts)}" if texts else ""
