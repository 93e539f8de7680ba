"""The sentences of a study on each rank and above each figure, by stated rules, from the rows of the summary."""

import re

import pandas as pd

from ks.files.columns import FINAL
from ks.report.speed import AS_FAST, measured_batches, times_of
from ks.report.study import Study, family_of
from ks.report.units import Units, units_of
from ks.report.verdict import ROUNDING, SMALL_EXCESS, Limit

NONE_FINISHED = "no rank has finished"


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


def _are(ranks, total: int) -> str:
    """Return the subject of a sentence on some ranks, with its verb."""
    return f"{listed(ranks, total)} {'is' if len(ranks) in (1, total) else 'are'}"


def not_faster(rows: list[dict]) -> str:
    """Return which ranks are not faster than dense, by batch size; empty if all are, or if nothing was measured."""

    def is_slow(row: dict, batch: int) -> bool:
        times = times_of(row, batch)
        return times is not None and times[0] > AS_FAST * times[1]

    slow = {batch: [row["rank"] for row in rows if is_slow(row, batch)] for batch in measured_batches(rows)}
    texts = [f"{listed(ranks, len(rows))} at batch {batch}" for batch, ranks in slow.items() if ranks]
    return f"not faster than dense: {'; '.join(texts)}" if texts else ""


def advice(rows: list[dict], sampling: str | None = None) -> list[str]:
    """Return what to do about each rank that is not at its floor, one line each.

    Args:
        rows: of the summary, as `ks.report.summary.rank_row` returns them.
        sampling: of the study.
    """
    sentences = []
    for row in rows:
        rank, verdict = row["rank"], row["verdict"]
        if row["failed"]:
            sentences.append(f"Rank {rank}: {row['status']}; see its train.log.")
        elif verdict is not None and verdict.limit is Limit.SAMPLES:
            remedy = "--sampling auto or more samples" if sampling == "fixed" else "more samples"
            sentences.append(
                f"Rank {rank} is sample-limited: its loss is {_above(row)}, and the training loss shows less than half "
                f"of this gap. Use {remedy}."
            )
        elif verdict is not None and verdict.limit is Limit.TRAINING:
            sentences.append(
                f"Rank {rank} is undertrained: its loss is {_above(row)} ({row['removed_share']:.2%} of the achievable "
                "reduction). Increase --num_epochs."
            )
        elif verdict is not None and verdict.limit is Limit.SMALL:
            sentences.append(
                f"Rank {rank} is {Limit.SMALL}: its loss exceeds {_reference(row)} by {100 * row['excess']:.2g}% of "
                "the output energy. A larger --num_epochs gains little."
            )
        if verdict is not None and verdict.calibration_limited:
            sentences.append(
                f"Rank {rank} is calibration-limited: it loses {row['held_out_relative_loss']:.2%} on held-out inputs, "
                f"{row['relative_loss']:.2%} on the measured ones. Measure more inputs."
            )
    larger = [str(row["rank"]) for row in rows if row["verdict"] is not None and row["verdict"].larger_than_dense]
    if larger:
        sentences.append(f"Larger than the dense weight: rank {', '.join(larger)}.")
    slow = not_faster(rows)
    return [*sentences, f"{slow[0].upper()}{slow[1:]}."] if slow else sentences


def recommendation(study: Study) -> list[str]:
    """Return the sentences that open a report: the answer of the study, after low-rank where that is the better choice.

    Low-rank is better if it can lose less than the rank that the answer names, with no more parameters.
    """
    answer = list(study.answer)
    named = re.search(r"\brank (\d+)", answer[0], re.IGNORECASE) if answer else None
    rows = study.summary[study.summary["rank"] == int(named[1])] if named else study.summary.iloc[:0]
    rows = rows[["parameters", "relative_loss"]].astype(float).dropna()
    if named is None or rows.empty or study.floor.empty or family_of(study) == "lowrank" or "low-rank" in answer[0]:
        return answer
    beside, ours = study.lowrank_beside(rows["parameters"]).iloc[0], rows["relative_loss"].iloc[0]
    if beside["relative_loss"] >= ours:
        return answer
    texts = [units_of(study).show(loss) for loss in (beside["relative_loss"], ours)]
    first = (
        f"Prefer a low-rank factorisation: at rank {beside['rank']:.0f} it gets down to {texts[0]}, with no more "
        f"parameters than this chain at rank {named[1]}, which loses {texts[1]}."
    )
    return [first, *answer]


def of_losses(losses: pd.DataFrame, summary: pd.DataFrame, units: Units) -> str:
    """Return the loss of the best rank, and which ranks are not at their floors."""
    known = losses[losses["best"].notna()]
    if known.empty:
        return NONE_FINISHED
    best = known.loc[known["best"].idxmin()]
    end = "loses {} of the output energy" if units.relative else "ends at {}"
    start = f"rank {best['rank']} {end.format(units.show(best['best']))}"
    return "; ".join(filter(None, [start, of_limits(summary)]))


def of_limits(summary: pd.DataFrame) -> str:
    """Return which ranks are not at their floors; empty if no rank has a verdict on its floor."""
    verdicts = dict(zip(summary["rank"], summary["verdict"].map(lambda verdict: str(verdict).split(", ")[0])))
    judged = {rank: verdict for rank, verdict in verdicts.items() if verdict in [*Limit]}
    away = {limit: [rank for rank, verdict in judged.items() if verdict == limit] for limit in Limit}
    del away[Limit.CONVERGED]
    texts = [f"{_are(ranks, len(summary))} {limit}" for limit, ranks in away.items() if ranks]
    if len(summary) == 1:
        texts = [f"it is {limit}" for limit, ranks in away.items() if ranks]
    if texts or not judged:
        return ", ".join(texts)
    state = "at its floor" if summary["loss_floor_is_exact"].fillna(True).all() else "converged"
    return f"every rank is {state}" if len(judged) > 1 else f"it is {state}"


def of_range(losses: pd.DataFrame, units: Units) -> str:
    """Return how the loss falls from the smallest to the largest rank."""
    known = losses[losses["best"].notna()].sort_values("rank")
    if len(known) < 2:
        return of_losses(losses, pd.DataFrame({"rank": [], "verdict": [], "loss_floor_is_exact": []}), units)
    first, last = known.iloc[0], known.iloc[-1]
    kind = "the relative loss" if units.relative else "the loss"
    change = "falls" if last["best"] < first["best"] else "does not fall"
    return (
        f"from rank {first['rank']} to rank {last['rank']}, {kind} {change} from {units.show(first['best'])} to "
        f"{units.show(last['best'])}"
    )


def of_floors(losses: pd.DataFrame, curve: pd.DataFrame, units: Units, target: float | None) -> str:
    """Return which rank can reach a target; without one, what the largest trained rank can reach.

    Args:
        losses: of the trained ranks that have a floor.
        curve: the floor of every rank; only lower bounds if any trained rank is bracketed.
        units: of the losses.
        target: relative loss, or None.
    """
    last = losses.iloc[-1]
    if target is None:
        if last["bracketed"]:
            upper, lower = (units.show(last[name]) for name in ("upper", "lower"))
            return f"at rank {last['rank']}, the best known chain loses {upper}, and no chain loses less than {lower}"
        return f"no chain of rank {last['rank']} loses less than {units.show(last['lower'])}"
    goal = f"reach the target of {100 * target:.6g}%"
    if losses["bracketed"].any():  # the curve is a weaker bound than those of the trained ranks
        able = losses["rank"][losses[["upper", "exact"]].min(axis=1) <= target]
        known = f"rank {able.min()} is the smallest trained rank that" if len(able) else "no trained rank"
        return f"{known} is known to {goal}"
    able = curve["rank"][curve["relative_loss"] <= target]
    return f"rank {able.min()} is the smallest that can {goal}" if len(able) else f"no rank can {goal}"


def of_gaps(losses: pd.DataFrame, summary: pd.DataFrame) -> str:
    """Return how far above its floor the worst rank ends."""
    excess = (losses["exact"] - losses["upper"]).dropna()
    if excess.empty:
        return NONE_FINISHED
    goal = "its best known chain" if losses["bracketed"].any() else "its floor"
    worst, rank = excess.max(), losses["rank"][excess.idxmax()]
    if worst <= ROUNDING:
        return f"no rank ends above {goal}"
    if worst <= SMALL_EXCESS:
        return f"every rank ends at most {100 * worst:.2g}% of the output energy above {goal}"
    verdict = str(summary.set_index("rank")["verdict"].get(rank)).split(", ")[0]
    return f"rank {rank} ends furthest above {goal}, by {worst:.2%} of the output energy; it is {verdict}"


def of_front(losses: pd.DataFrame, lowrank_at: pd.Series, family: str) -> str:
    """Return whether the trained chains lose less than low-rank of the same size.

    Args:
        losses: of the trained ranks.
        lowrank_at: the floor of low-rank with at most as many parameters, by row.
        family: name of the chain.
    """
    if family == "lowrank":
        last = losses.iloc[-1]
        return f"rank {last['rank']} loses {100 * last['best']:.3g}% with {last['parameters']:,.0f} parameters"
    better = losses["rank"][losses["best"] < lowrank_at]
    if better.empty:
        return f"at equal size, low-rank can lose less than every trained {family} chain"
    if len(better) == len(losses):
        return f"every trained {family} chain loses less than low-rank can at equal size"
    verb = "loses" if len(better) == 1 else "lose"
    which = listed(better, len(losses))
    return f"at equal size, {which} of {family} {verb} less than low-rank can; the other ranks lose more"


def of_metric(metric: str, summary: pd.DataFrame) -> str:
    """Return where a metric ends, for the smallest and the largest finished rank that has it."""
    column = f"{FINAL}{metric}"
    known = summary.dropna(subset=[column]).sort_values("rank") if column in summary else summary.iloc[:0]
    if known.empty:
        return NONE_FINISHED
    ends = dict.fromkeys((known["rank"].iloc[0], known["rank"].iloc[-1]))
    values = known.set_index("rank")[column]
    return f"at the end, {metric} is " + " and ".join(f"{values[rank]:.4g} at rank {rank}" for rank in ends)


def of_latency(rows: list[dict]) -> str:
    """Return which ranks are not faster than dense, by batch size; rows are those of the summary."""
    faster = "every chain is faster than dense at every batch size" if len(rows) > 1 else "faster than dense"
    return not_faster(rows) or faster


def _reference(row: dict) -> str:
    return "the floor" if row.get("loss_floor_is_exact") else "that of the best known chain"


def _above(row: dict) -> str:
    if row.get("optimality_gap") is None:
        return f"{row['excess']:.2%} of the output energy above {_reference(row)}"
    gap = 100 * row["optimality_gap"]
    return f"{gap:.0f}% above {_reference(row)}" if gap >= 10 else f"{gap:.2g}% above {_reference(row)}"
