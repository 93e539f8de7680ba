"""The sentence above each figure: what it shows, by stated rules, from the rows of the summary."""

import pandas as pd

from ks.files.columns import FINAL
from ks.report.figures.units import Units
from ks.report.speed import listed, not_faster
from ks.report.verdict import ROUNDING, SMALL_EXCESS, Limit


def of_losses(losses: pd.DataFrame, summary: pd.DataFrame, units: Units) -> str:
    """Return what the rank of the lowest loss loses, and which ranks are not at their floors."""
    known = losses[losses["best"].notna()]
    if known.empty:
        return "no rank has finished"
    best = known.loc[known["best"].idxmin()]
    verb = "loses" if units.shares else "ends at"
    return "; ".join(filter(None, [f"rank {best['rank']} {verb} {units.show(best['best'])}", of_limits(summary)]))


def of_limits(summary: pd.DataFrame) -> str:
    """Return which ranks are not at their floors; empty if no rank has a verdict on its floor."""
    verdicts = dict(zip(summary["rank"], summary["verdict"].map(lambda verdict: str(verdict).split(", ")[0])))
    judged = {rank: verdict for rank, verdict in verdicts.items() if verdict in [*Limit]}
    away = {limit: [rank for rank, verdict in judged.items() if verdict == limit] for limit in Limit}
    del away[Limit.CONVERGED]
    texts = [f"{listed(ranks, len(summary))} {limit}" for limit, ranks in away.items() if ranks]
    if len(summary) == 1:
        texts = [str(limit) for limit, ranks in away.items() if ranks]
    if texts or not judged:
        return ", ".join(texts)
    state = "at its floor" if summary["loss_floor_is_exact"].fillna(True).all() else "converged"
    return f"every rank {state}" if len(judged) > 1 else state


def of_range(losses: pd.DataFrame, units: Units) -> str:
    """Return how the loss falls from the smallest to the largest rank."""
    known = losses[losses["best"].notna()].sort_values("rank")
    if len(known) < 2:
        return of_losses(losses, pd.DataFrame({"rank": [], "verdict": [], "loss_floor_is_exact": []}), units)
    first, last = known.iloc[0], known.iloc[-1]
    kind = "the share of energy lost" if units.shares else "the loss"
    change = "falls" if last["best"] < first["best"] else "does not fall"
    return (
        f"from rank {first['rank']} to {last['rank']}, {kind} {change} from {units.show(first['best'])} to "
        f"{units.show(last['best'])}"
    )


def of_floors(losses: pd.DataFrame, curve: pd.DataFrame, units: Units, target: float | None) -> str:
    """Return which rank can reach a target; without one, what the largest trained rank can reach.

    Args:
        losses: of the trained ranks that have a floor.
        curve: the floor of every rank; only lower bounds if any trained rank is bracketed.
        units: of the losses.
        target: share of the output energy that may be lost.
    """
    last, bracketed = losses.iloc[-1], losses["bracketed"].any()
    if target is not None:
        able = curve["rank"][curve["relative_loss"] <= target]
        if able.empty:
            return f"no rank can reach the target of {100 * target:.6g}%"
        if not bracketed:
            return f"rank {able.min()} is the smallest that can reach the target of {100 * target:.6g}%"
        known = losses["rank"][losses["upper"] <= target]
        reached = f"rank {known.min()} can" if len(known) else "no trained rank is known to"
        return f"no rank below {able.min()} can reach the target of {100 * target:.6g}%; {reached}"
    if last["bracketed"]:
        bounds = (units.show(last[name]) for name in ("upper", "lower"))
        return "rank {} can reach {}, and never less than {}".format(last["rank"], *bounds)
    return f"no chain of rank {last['rank']} loses less than {units.show(last['lower'])}"


def of_gaps(losses: pd.DataFrame, summary: pd.DataFrame) -> str:
    """Return how far above its floor the worst rank ends."""
    excess = (losses["exact"] - losses["upper"]).dropna()
    if excess.empty:
        return "no rank has finished"
    goal = "its best known chain" if losses["bracketed"].any() else "its floor"
    worst, rank = excess.max(), losses["rank"][excess.idxmax()]
    if worst <= ROUNDING:
        return f"no rank ends above {goal}"
    if worst <= SMALL_EXCESS:
        return f"every rank ends at most {100 * worst:.2g}% of the energy above {goal}"
    verdict = str(summary.set_index("rank")["verdict"].get(rank)).split(", ")[0]
    return f"rank {rank} ends furthest above {goal}, by {worst:.2%} of the energy: {verdict}"


def of_front(losses: pd.DataFrame, lowrank_at: pd.Series, family: str) -> str:
    """Return whether the trained chains lose less than low-rank at equal parameters.

    Args:
        losses: of the trained ranks.
        lowrank_at: the floor of low-rank with as many parameters, by row.
        family: name of the chain.
    """
    better = losses["rank"][losses["best"] < lowrank_at]
    if family == "lowrank":
        last = losses.iloc[-1]
        return f"rank {last['rank']} loses {100 * last['best']:.3g}% with {last['parameters']:.0f} parameters"
    if better.empty:
        return f"at equal parameters, low-rank can lose less than every trained {family} chain"
    if len(better) == len(losses):
        return f"every trained {family} chain loses less than low-rank can at equal parameters"
    return f"at equal parameters, {listed(better, len(losses))} of {family} loses less than low-rank can; others do not"


def of_metric(metric: str, summary: pd.DataFrame) -> str:
    """Return where a metric ends, for the smallest and the largest finished rank that has it."""
    column = f"{FINAL}{metric}"
    known = summary.dropna(subset=[column]).sort_values("rank") if column in summary else summary.iloc[:0]
    if known.empty:
        return "no rank has finished"
    ends = dict.fromkeys((known["rank"].iloc[0], known["rank"].iloc[-1]))
    values = known.set_index("rank")[column]
    return f"at the end, {metric} is " + " and ".join(f"{values[rank]:.4g} at rank {rank}" for rank in ends)


def of_latency(rows: list[dict]) -> str:
    """Return which ranks are not faster than dense, by batch size; rows are those of the summary."""
    faster = "every chain is faster than dense at every batch size" if len(rows) > 1 else "faster than dense"
    return not_faster(rows) or faster
