"""The sentences of a study on each rank, above each figure and at the top of the report, by stated rules."""

from collections.abc import Iterable

import pandas as pd

from ks.files.columns import BATCHES, FINAL
from ks.files.status import ended_well
from ks.report.answer import LOWRANK, best_known, named_row, trained_and_reachable
from ks.report.read_results import Study
from ks.report.summary import times_of
from ks.report.verdict import ROUNDING, SMALL_EXCESS, Limit, Mark, converged_loss, parts_of
from ks.report.words import Words

NONE_FINISHED = "no rank has finished"
MOST_LISTED = 3  # ranks of several studies that a sentence lists
AS_FAST = 0.95  # a time counts as less than another one below this fraction of it: closer ratios are noise


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


def of_failures(rows: Iterable[tuple[str, dict]]) -> list[str]:
    """Return a sentence on the ranks of which a run did not end well; none if all did.

    Args:
        rows: of summaries, each with the name of its study.
    """
    failed = [f"{name}, rank {row['rank']}: {row['status']}" for name, row in rows if not ended_well(row["status"])]
    return [f"Not every run ended well: {first_of(failed)}."] if failed else []


def first_of(texts: list[str]) -> str:
    """Return the first few texts, and how many there are beside them."""
    more = f"; and {len(texts) - MOST_LISTED} more" if len(texts) > MOST_LISTED else ""
    return "; ".join(texts[:MOST_LISTED]) + more


def _slower(rows: list[dict], other: str, factor: float) -> str:
    """Return the ranks, by batch size, that take more than `factor` of the time of "dense" or "lowrank"; or nothing."""
    texts = []
    for batch in BATCHES:
        times = {row["rank"]: found[batch] for row in rows if batch in (found := times_of(row, other))}
        if slow := [rank for rank, (chain, beside) in times.items() if chain > factor * beside]:
            texts.append(f"{listed(slow, len(rows))} at batch {batch}")
    return "; ".join(texts)


def advice(rows: list[dict], sampling: str | None = None) -> list[str]:
    """Return what to do about each rank that is not at its floor, one line each; then the ranks that are not faster.

    Args:
        rows: of the summary, as `ks.report.summary.rank_row` returns them.
        sampling: of the study.
    """
    sentences, words = [], Words.of(rows[0])
    for row in rows:
        rank, verdict, best = row["rank"], parts_of(row), row["relative_floor_upper"]
        goal = "the floor" if row["loss_floor_is_exact"] else "that of the best known chain"
        if row["failed"]:
            sentences.append(f"Rank {rank}: {row['status']}; see its train.log.")
        elif Limit.SAMPLES in verdict or Limit.TRAINING in verdict:
            distance, limit = words.amounts(row["excess"], max(converged_loss(best) - best, SMALL_EXCESS))
            text = f"its loss is {words.whole(distance)} above {goal}, where at most {limit} would do"
            remedy = "Increase --num_epochs."
            if Limit.SAMPLES in verdict:
                text += ", and the training loss shows less than half of this distance"
                remedy = f"Use {'--sampling auto or ' if sampling == 'fixed' else ''}more samples."
            sentences.append(f"Rank {rank} is {verdict[0]}: {text}. {remedy}")
        elif words.small in verdict:
            sentences.append(
                f"Rank {rank} is {words.small}: its loss exceeds {goal} by {words.show(row['excess'])}. A larger "
                "--num_epochs gains little."
            )
        if Mark.CALIBRATION_LIMITED in verdict:
            held_out, measured = words.amounts(words.held_out(row), row["relative_loss"])
            sentences.append(
                f"Rank {rank} is calibration-limited: it {words.loses} {held_out} on held-out inputs, {measured} on "
                "the measured ones. Measure more inputs."
            )
    larger = [str(row["rank"]) for row in rows if Mark.LARGER_THAN_DENSE in parts_of(row)]
    if larger:
        sentences.append(f"Larger than the dense weight: rank {', '.join(larger)}.")
    if slow := _slower(rows, "dense", AS_FAST):
        sentences.append(f"Not faster than dense: {slow}.")
    is_lowrank = (rows[0]["chain"] or "").split(" ")[0] == "lowrank"  # two nn.Linear of the very same products
    if not is_lowrank and (slow := _slower(rows, "lowrank", 1 / AS_FAST)):
        sentences.append(f"Slower than a low-rank factorisation of the same size: {slow}.")
    return sentences


def recommendation(study: Study) -> list[str]:
    """Return the sentences that open a report: the answer of the study, after low-rank where that is the better choice.

    Low-rank is better if it can lose less than the rank that the answer names can, with no more parameters.
    """
    row, answer = named_row(study.rows, study.target), study.config.answer
    if not answer or row is None or study.floor.empty or study.family == "lowrank":
        return answer
    beside = study.lowrank_beside(pd.Series([row["parameters"]])).iloc[0]
    rank, loss = int(beside["rank"]), beside["relative_loss"]
    if loss >= best_known(row):
        return answer
    least, ours = trained_and_reachable(row, loss)
    first = (
        f"Prefer a low-rank factorisation: at rank {rank} it can reach {least}, with no more parameters than this "
        f"chain at rank {row['rank']}, which {ours}."
    )
    return [first, *(sentence for sentence in answer if not sentence.startswith(LOWRANK))]


def of_losses(study: Study) -> str:
    """Return the loss of the best rank, and which ranks are not at their floors."""
    return "; ".join(filter(None, [_of_best(study), _of_limits(study.rows)]))


def _of_best(study: Study) -> str:
    known = study.losses.dropna(subset=["best"])
    if known.empty:
        return NONE_FINISHED
    best = known.loc[known["best"].idxmin()]
    verb = study.words.may_lose if study.units.relative else "ends at"
    return f"rank {best['rank']} {verb} {study.units.whole(best['best'])}"


def _of_limits(rows: list[dict]) -> str:
    """Return which ranks are not at their floors; empty if no rank has a verdict on its floor."""
    limited = {limit: [row["rank"] for row in rows if limit in parts_of(row)] for limit in Limit}
    converged, texts = limited.pop(Limit.CONVERGED), []
    for limit, ranks in limited.items():
        if ranks:
            subject = "it" if len(rows) == 1 else listed(ranks, len(rows))
            texts.append(f"{subject} {'is' if len(ranks) in (1, len(rows)) else 'are'} {limit}")
    if texts or not converged:
        return ", ".join(texts)
    state = "converged" if any(row["loss_floor_is_exact"] is False for row in rows) else "at its floor"
    return f"every rank is {state}" if len(converged) > 1 else f"it is {state}"


def of_range(study: Study) -> str:
    """Return how the loss falls from the smallest to the largest rank."""
    known, units = study.losses.dropna(subset=["best"]), study.units
    if len(known) < 2:
        return _of_best(study)
    first, last = known.iloc[0], known.iloc[-1]
    kind = units.words.relative if units.relative else "the loss"
    change = "falls" if last["best"] < first["best"] else "does not fall"
    return (
        f"from rank {first['rank']} to rank {last['rank']}, {kind} {change} from {units.show(first['best'])} to "
        f"{units.show(last['best'])}"
    )


def of_floors(study: Study) -> str:
    """Return which rank can reach the target; without one, what the largest trained rank can reach."""
    losses, units, target = study.losses.dropna(subset=["lower", "exact"]), study.units, study.target
    loses = units.words.loses
    last = losses.iloc[-1]
    if target is None:
        upper, lower = (units.show(last[name]) for name in ("upper", "lower"))
        if last["bracketed"]:
            return (
                f"at rank {last['rank']}, the best known chain {loses} {upper}, and no chain {loses} less than {lower}"
            )
        return f"no chain of rank {last['rank']} {loses} less than {lower}"
    goal = f"reach the target of {units.words.amounts(target)[0]}"
    if losses["bracketed"].any():  # the floor of every rank is then a weaker bound than those of the trained ranks
        able = losses["rank"][losses[["upper", "exact"]].min(axis=1) <= target * units.zero]
        known = f"rank {able.min()} is the smallest trained rank that" if len(able) else "no trained rank"
        return f"{known} is known to be able to {goal}"
    floor = study.floor[study.floor["chain"] == study.family]
    able = floor["rank"][floor["relative_loss"] <= target]
    return f"rank {able.min()} is the smallest that can {goal}" if len(able) else f"no rank can {goal}"


def of_gaps(study: Study) -> str:
    """Return how far above its floor the worst rank ends."""
    losses, units = study.losses, study.units
    excess = (losses["exact"] - losses["upper"]).dropna()
    if excess.empty:
        return NONE_FINISHED
    goal = "its best known chain" if losses["bracketed"].any() else "its floor"
    worst, rank = excess.max(), losses["rank"][excess.idxmax()]
    if worst <= ROUNDING * units.zero:
        return f"no rank ends above {goal}"
    if worst <= SMALL_EXCESS * units.zero:
        return f"every rank ends at most {units.whole(worst)} above {goal}"
    limit = [f"it is {parts_of(row)[0]}" for row in study.rows if row["rank"] == rank and row["verdict"]]
    return "; ".join([f"rank {rank} ends furthest above {goal}, by {units.whole(worst)}", *limit])


def of_front(study: Study, losses: pd.DataFrame) -> str:
    """Return whether the trained ranks can lose less than low-rank of the same size, by the best known chains.

    Args:
        study: of the chains.
        losses: rows of its losses with a population loss and parameters.
    """
    family, units, lose, loses = study.family, study.units, study.words.lose, study.words.loses
    can, cannot = ("are known to", "are not known to") if losses["bracketed"].any() else ("can", "cannot")
    if family == "lowrank":
        last = losses.iloc[-1]
        return f"rank {last['rank']} {loses} {units.show(last['best'])} with {last['parameters']:,.0f} parameters"
    beside = study.lowrank_beside(losses["parameters"])["relative_loss"] * units.zero
    better = losses["rank"][losses[["best", "upper"]].min(axis=1) < beside * (1 - ROUNDING)]
    if better.empty:
        return f"at equal size, the trained ranks of {family} {cannot} {lose} less than low-rank"
    which, others = listed(better, len(losses)), "" if len(better) == len(losses) else f"; the other ranks {cannot}"
    can = "is known to" if can != "can" and (len(better) in (1, len(losses))) else can
    return f"at equal size, {which} of {family} {can} {lose} less than low-rank{others}"


def of_metric(metric: str, summary: pd.DataFrame) -> str:
    """Return where a metric ends, for the smallest and the largest finished rank that has it."""
    column = f"{FINAL}{metric}"
    if column not in summary or (values := summary.set_index("rank")[column].dropna().sort_index()).empty:
        return NONE_FINISHED
    ends = dict.fromkeys((values.index[0], values.index[-1]))
    return f"at the end, {metric} is " + " and ".join(f"{values[rank]:.4g} at rank {rank}" for rank in ends)


def of_latency(rows: list[dict]) -> str:
    """Return which ranks are not faster than dense, by batch size; rows are those of the summary."""
    if slow := _slower(rows, "dense", AS_FAST):
        return f"not faster than dense: {slow}"
    return "every chain is faster than dense at every batch size" if len(rows) > 1 else "faster than dense"
