"""The answer of a study in sentences, which begins with one rank: a function of rows and of a record of facts.

docs/files.md states the rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log

from ks.bounds.rank_floors import TargetRanks
from ks.files.status import ended_well
from ks.report.summary import times_of
from ks.report.verdict import NEGLIGIBLE_FLOOR, Limit, parts_of
from ks.report.words import Words, percents

# A knee lies below the chord of the front by this fraction of its height and width, in logarithms.
KNEE_DEPTH = 0.05
LOWRANK = "A low-rank factorisation of the same size"  # begins the sentence on it
# More epochs are advised up to this many times those of the study; beyond, a larger rank is the remedy.
MOST_EPOCHS = 10
# A continuation that is shorter than the run restarts at a small rate and may gain less than 1 / epochs predicts.
LEAST_EPOCHS = 2


@dataclass(frozen=True)
class Facts:
    """The bounds, as far as the answer needs them; losses are relative to the zero predictor.

    lowrank: for each rank of the study, the largest low-rank chain with at most as many parameters: its rank and its
    least loss; empty if the family has no floor or is low-rank. target: the ranks around the target; None without a
    target or a floor. remedy: if the target was missed, a rank whose best known chain reaches it with a margin as large
    as the excess of the named rank, the loss of that chain, and whether it is larger than dense. uncertified: the ranks
    of the answer whose lower bounds ran out of time, and `seconds`, the time for all of them. disturbed: whether other
    runs were going on when the times of the named rank were measured.
    """

    lowrank: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    target: TargetRanks | None = None
    remedy: tuple[int, float, bool] | None = None
    uncertified: tuple[int, ...] = ()
    seconds: float = 0.0
    disturbed: bool = False


def answer(rows: list[dict], facts: Facts, target: float | None = None) -> list[str]:
    """Return the answer of a study, most important sentence first.

    Args:
        rows: of the summary, as `ks.report.summary.rank_row` returns them.
        facts: of the study.
        target: loss that may be lost, relative to the zero predictor, or None.
    """
    known = _with_losses(rows)
    named = named_row(rows, target)
    words = Words.of(rows[0])
    if not any(ended_well(row["status"]) for row in rows):
        return ["No rank has finished, so no rank can be named."]
    if named is None:
        return [
            "The criterion is not the mean squared error, so the fraction of the output energy lost is not known: "
            "compare final_val_loss."
        ]
    if target is None:
        sentences = _on_front(named, known, words)
    elif named["relative_loss"] <= target:
        sentences = _reached(named, known, facts, target, words)
    else:
        sentences = _not_reached(named, facts, target, words)
    sentences += words.both_metrics(named)
    sentences += _bounds(named, facts, words)
    sentences += _warnings(named, target, facts.disturbed, words)
    beaten = {row["rank"]: found[0]["rank"] for row in known if (found := _dominators(row, known))}
    if beaten:
        pairs = ", ".join(f"{rank} by {better}" for rank, better in beaten.items())
        sentences.append(f"Dominated, by a rank with no more parameters and no more loss: {pairs}.")
    return sentences


def named_row(rows: list[dict], target: float | None = None) -> dict | None:
    """Return the row of the rank that the answer recommends; None if no finished rank has a loss that can be compared.

    With a target, it is the smallest rank that reached it, else the smallest that can, else the one that came closest.
    Without one, it is the smallest exact rank, else the knee, else the one with the smallest loss.
    """
    known = _with_losses(rows)
    if not known:
        return None
    closest = min(known, key=lambda row: row["relative_loss"])
    if target is None:
        exact = [row for row in known if row["relative_loss"] < NEGLIGIBLE_FLOOR]
        return min(exact, key=lambda row: row["parameters"]) if exact else knee(known) or closest
    reached = [row for row in known if row["relative_loss"] <= target]
    able = [row for row in known if (bound := row["relative_floor_upper"]) is not None and bound <= target]
    return min(reached or able, key=lambda row: row["rank"], default=closest)


def _with_losses(rows: list[dict]) -> list[dict]:
    """Return the rows of finished ranks with a relative loss."""
    return [row for row in rows if ended_well(row["status"]) and row["relative_loss"] is not None]


def _reached(named: dict, rows: list[dict], facts: Facts, target: float, words: Words) -> list[str]:
    rank = named["rank"]
    loss, limit = words.amounts(named["relative_loss"], target)
    sentences = [
        f"Rank {rank} is the smallest trained rank that {words.loses} at most {words.whole(limit)}: it {words.loses} "
        f"{loss}, with {_size(named)}."
    ]
    found = facts.target
    if found is None:
        return sentences
    if found.reaching >= rank:
        return [*sentences, _smaller_ranks(found, rank)]
    ended = next((row["relative_loss"] for row in rows if row["rank"] == found.reaching), None)
    best, limit, *end = words.amounts(found.loss, target, *([] if ended is None else [ended]))
    floor = f"{_floor_is(found.exact, words)} {best}"
    if ended is None:
        sentences.append(f"Rank {found.reaching}, which was not trained, can reach {limit} too: {floor}.")
    else:
        sentences.append(f"Rank {found.reaching} can reach {limit} too, but ends at {end[0]}: {floor}.")
    return [*sentences, _smaller_ranks(found, found.reaching)]


def _smaller_ranks(found: TargetRanks, rank: int) -> str:
    """Return whether a rank below this one can reach the target."""
    if found.none_below >= rank:
        return "No smaller rank can reach it."
    open_ranks = (
        f"ranks {found.none_below} to {rank - 1} can" if found.none_below < rank - 1 else f"rank {rank - 1} can"
    )
    if found.none_below == 1:
        return f"Whether {open_ranks} reach it is not known."
    return f"No rank below {found.none_below} can reach it; whether {open_ranks} is not known."


def _not_reached(named: dict, facts: Facts, target: float, words: Words) -> list[str]:
    """Return how close the named row came, and the remedies.

    Epochs suffice if the excess falls at least as fast as 1 / epochs does. None are advised if the floor is above the
    target, if samples are the limit, or beyond ten times those of the study.
    """
    rank, floor, found = named["rank"], named["relative_floor_upper"], facts.target
    if found is None or floor is None:
        loss, limit = words.amounts(named["relative_loss"], target)
        return [f"{words.whole(limit)} is not reached: rank {rank} ends at {loss}; try a larger rank."]
    loss, best, limit = words.amounts(named["relative_loss"], floor, target)
    exact = _floor_is(named["loss_floor_is_exact"], words)
    text = f"{words.whole(limit)} is not reached: rank {rank} ends at {loss}, {exact} {best}"
    if floor > target:
        text += f"; no rank below {found.none_below} can reach it"
    elif rank > found.reaching:
        text += f"; rank {found.reaching} is the smallest that can reach it"
    room, epochs, remedies = target - floor, named["num_epochs"], []
    if room > 0 and Limit.SAMPLES not in parts_of(named):
        total = max(LEAST_EPOCHS * epochs, -(-epochs * (named["relative_loss"] - floor) // room))
        if total <= MOST_EPOCHS * epochs:
            remedies.append(f"--num_epochs {int(total)}")
    if facts.remedy is not None:
        larger, loss_there, larger_than_dense = facts.remedy
        dense = ", larger than dense" if larger_than_dense else ""
        remedies.append(
            f"--ranks {larger} (where {words.amounts(loss_there)[0]} is possible, a margin for training{dense})"
        )
    return [f"{text}. Use {' or '.join(remedies)}." if remedies else f"{text}."]


def _floor_is(exact: bool, words: Words) -> str:
    """Return how a sentence begins that gives the upper bound of a rank: only an exact floor is its floor."""
    return "its floor is" if exact else f"the best known chain {words.loses}"


def _on_front(named: dict, rows: list[dict], words: Words) -> list[str]:
    if named["relative_loss"] < NEGLIGIBLE_FLOOR:
        return [f"Rank {named['rank']} is the smallest trained rank that {words.loses} nothing: it has {_size(named)}."]
    if knee(rows) is not None:
        start, end = f"Rank {named['rank']} is the knee of loss against parameters", ""
    else:
        start = f"Rank {named['rank']} {words.loses} least"
        end = f"; loss against parameters has no knee, so choose with {words.target_flag}" if len(rows) > 2 else ""
    return [f"{start}: it {words.loses} {words.show(named['relative_loss'])}, with {_size(named)}{end}."]


def knee(rows: list[dict]) -> dict | None:
    """Return the row farthest below the chord of the front of loss against parameters, both in logarithms.

    The front has the ranks that are smaller than dense and not dominated. None if it has fewer than three, or if no one
    lies below the chord by 5% of the height of the front.

    Source: Satopää, Albrecht, Irwin, Raghavan, "Finding a Kneedle in a haystack" (2011), with the scale of a front.
    """
    front = [row for row in rows if row["compression_ratio"] > 1 and not _dominators(row, rows)]
    front.sort(key=lambda row: row["parameters"])
    if len(front) < 3:
        return None
    first, last = front[0], front[-1]
    width = log(last["parameters"] / first["parameters"])
    height = log(first["relative_loss"] / last["relative_loss"])

    def depth(row: dict) -> float:
        right = log(row["parameters"] / first["parameters"]) / width
        down = log(first["relative_loss"] / row["relative_loss"]) / height
        return down - right

    deepest = max(front, key=depth)
    return deepest if depth(deepest) >= KNEE_DEPTH else None


def _dominators(row: dict, rows: list[dict]) -> list[dict]:
    """Return the rows with at most the parameters and the loss of a row; of equal ones the smallest rank counts."""
    parameters, loss = row["parameters"], row["relative_loss"]
    return [
        other
        for other in rows
        if other["parameters"] <= parameters
        and other["relative_loss"] <= loss
        and (other["parameters"] < parameters or other["relative_loss"] < loss or other["rank"] < row["rank"])
    ]


def _bounds(row: dict, facts: Facts, words: Words) -> list[str]:
    """Return the bounds of a rank if they differ, those that ran out of time, and the loss that low-rank can reach."""
    rank, sentences = row["rank"], []
    if row["loss_floor_is_exact"] is False:
        lower, upper = words.amounts(row["relative_floor"], row["relative_floor_upper"])
        sentences.append(
            f"No chain of rank {rank} {words.loses} less than {lower}; the best known one {words.loses} {upper}."
        )
    if facts.uncertified:
        ranks = "ranks " if len(facts.uncertified) > 1 else "rank "
        ranks += " and ".join(map(str, sorted(facts.uncertified)))
        sentences.append(
            f"The lower bound of {ranks} can be tighter, but not within {facts.seconds:g} s: raise --tight_bounds."
        )
    if rank in facts.lowrank:
        lowrank, floor = facts.lowrank[rank]
        loss, ours = trained_and_reachable(row, floor)
        advice = "; sweep --chain lowrank as well" if floor < best_known(row) else ""
        sentences.append(f"{LOWRANK} (rank {lowrank}) can reach {loss}; this chain {ours}{advice}.")
    return sentences


def best_known(row: dict) -> float:
    """Return the relative loss of the best chain of a rank that is known: the trained one, or that of the floor."""
    upper = row["relative_floor_upper"]
    return row["relative_loss"] if upper is None else min(row["relative_loss"], upper)


def trained_and_reachable(row: dict, other: float) -> tuple[str, str]:
    """Return another loss, and how a sentence on a chain goes on: what its run reached, and what it can reach."""
    trained, best = row["relative_loss"], best_known(row)
    shown, ours, least = Words.of(row).amounts(other, trained, best)
    can = "can" if row["loss_floor_is_exact"] else "is known to"
    return shown, f"is trained to {ours}" + (f" and {can} reach {least}" if best < trained else "")


def _warnings(row: dict, target: float | None, disturbed: bool, words: Words) -> list[str]:
    """Return the size of the named rank if it is too large, its time, and held-out inputs that lose more."""
    rank, sentences = row["rank"], []
    if row["compression_ratio"] < 1:
        sentences.append(f"WARNING: rank {rank} has more parameters than the dense weight.")
    ratios = {batch: chain / dense for batch, (chain, dense) in times_of(row).items()}
    if ratios:
        texts = ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in ratios.items())
        start = f"Time of rank {rank} over that of the dense weight here"
        if slow := [str(batch) for batch, ratio in ratios.items() if ratio > 1]:
            start = f"WARNING: rank {rank} is slower than dense at batch {', '.join(slow)}; its time over that of dense"
        if disturbed:
            start += ", measured while other runs were training (--jobs 1 avoids that)"
        sentences.append(f"{start}: {texts}.")
    held_out = words.held_out(row)
    if target is not None and held_out is not None and row["relative_loss"] <= target < held_out:
        loss, limit = words.amounts(held_out, target)
        sentences.append(f"WARNING: on held-out inputs, rank {rank} {words.loses} {loss}, more than {limit}.")
    return sentences


def _size(row: dict) -> str:
    return f"{percents(row['share_of_dense'])[0]} of the parameters of the dense weight"


def target_note(found: TargetRanks, isotropic: bool, words: Words) -> str:
    """Return the ranks around a target as a sentence, before any run."""
    text = "that can reach it"
    if not found.exact and found.none_below < found.reaching:
        text = f"whose best known chain reaches it; no rank below {found.none_below} can"
    inputs = "isotropic" if isotropic else "the measured"
    return f"target {words.show(found.target)}, for {inputs} inputs: rank {found.reaching} is the smallest {text}"
