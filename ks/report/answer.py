"""The answer of a study in sentences, the first one names a rank; docs/files.md states the rules."""

from math import log

from ks.bounds.floors import floor_of
from ks.bounds.plan import Plan
from ks.bounds.shares import shares
from ks.bounds.target_rank import smallest_ranks
from ks.files.status import ended_well
from ks.report.speed import measured_batches, times_of
from ks.report.verdict import NEGLIGIBLE_FLOOR, Limit

# The share of the height and width of the front, in logarithms, by which a knee lies below the chord.
KNEE_DEPTH = 0.05
# More epochs are advised up to this many times those of the study; beyond, a larger rank is the remedy.
MOST_EPOCHS = 10
# A continuation that is shorter than the training restarts at a small rate and may gain less than 1 / epochs says.
LEAST_EPOCHS = 2


def answer(rows: list[dict], plan: Plan, target: float | None = None) -> list[str]:
    """Return the answer of a study, most important sentence first.

    Args:
        rows: of the summary, as `ks.report.summary.rank_row` returns them.
        plan: of the study.
        target: share of the output energy that may be lost, or None.
    """
    finished = [row for row in rows if ended_well(row["status"])]
    known = [row for row in finished if row.get("relative_loss") is not None]
    if not finished:
        return ["No rank has finished, so no rank can be named."]
    if not known:
        return [
            "The criterion is not the mean squared error, so the share of the output energy lost is not known: compare "
            "final_val_loss."
        ]
    if target is not None:
        named, sentences = _by_target(known, plan, target)
    else:
        named, sentences = _by_front(known)
    sentences += _bounds_of(named)
    sentences += _lowrank_beside(named, plan)
    sentences += _warnings(named, target)
    return sentences + _dominated(known)


def _by_target(rows: list[dict], plan: Plan, target: float) -> tuple[dict, list[str]]:
    """Return the row that the answer names, and what it says of the target."""
    reached = [row for row in rows if row["relative_loss"] <= target]
    if not reached:
        return _not_reached(rows, plan, target)
    named = min(reached, key=lambda row: row["rank"])
    loss, limit = shares(named["relative_loss"], target)
    sentences = [
        f"Rank {named['rank']} is the smallest trained rank that loses at most {limit} of the output energy: it loses "
        f"{loss}, with {_size(named)}."
    ]
    if plan.bounds is None:
        return named, sentences
    lower, upper = smallest_ranks(plan, target)
    trained = {row["rank"]: row for row in rows}
    least = _what_floor_is(plan, upper)
    if upper < named["rank"] and upper in trained:
        ends, floor, limit = shares(trained[upper]["relative_loss"], plan.bounds.upper(upper), target)
        sentences.append(f"Rank {upper} can reach {limit} too, but ends at {ends}; {least} {floor}.")
    elif upper < named["rank"]:
        floor, limit = shares(plan.bounds.upper(upper), target)
        sentences.append(f"Rank {upper}, which was not trained, can reach {limit} too: {least} {floor}.")
    elif lower < named["rank"]:
        sentences.append(f"No rank below {lower} can reach it; whether ranks {lower} to {upper - 1} can is not known.")
    else:
        sentences.append("No smaller rank can reach it.")
    return named, sentences


def _not_reached(rows: list[dict], plan: Plan, target: float) -> tuple[dict, list[str]]:
    """Return the row that comes closest with the fewest parameters, and the remedies."""
    able = [row for row in rows if (row.get("relative_floor_upper") or 0.0) <= target] if plan.bounds else []
    named = min(able, key=lambda row: row["rank"]) if able else min(rows, key=lambda row: row["relative_loss"])
    floor = named.get("relative_floor_upper")
    if plan.bounds is None or floor is None:
        loss, limit = shares(named["relative_loss"], target)
        text = f"{limit} of the output energy is not reached: rank {named['rank']} ends at {loss}; try a larger rank."
        return named, [text]
    loss, least, limit = shares(named["relative_loss"], floor, target)
    what = _what_floor_is(plan, named["rank"])
    start = f"{limit} of the output energy is not reached: rank {named['rank']} ends at {loss}, {what} {least}"
    remedies = [*_more_epochs(named, floor, target), *_larger_rank(named, floor, plan, target)]
    lower, upper = smallest_ranks(plan, target)
    if not able:
        start += f"; no rank below {lower} can reach it"
    elif named["rank"] > upper:
        start += f"; rank {upper} is the smallest that can reach it"
    return named, [f"{start}. Use {' or '.join(remedies)}."]


def _what_floor_is(plan: Plan, rank: int) -> str:
    """Return how a sentence names the upper bound of a rank: only an exact floor is its floor."""
    assert plan.bounds is not None
    return "its floor is" if floor_of(plan.bounds, plan.chain, rank).exact else "the best known chain loses"


def _more_epochs(row: dict, floor: float, target: float) -> list[str]:
    """Return the epochs that suffice if the excess falls at least as fast as 1 / epochs does.

    None are advised if the floor is above the target, if samples are the limit, or beyond ten times those of the study.
    """
    room = target - floor
    sampled = row["verdict"] is not None and row["verdict"].limit is Limit.SAMPLES
    if room <= 0 or sampled:
        return []
    total = max(LEAST_EPOCHS * row["num_epochs"], -(-row["num_epochs"] * (row["relative_loss"] - floor) // room))
    if total > MOST_EPOCHS * row["num_epochs"]:
        return []
    return [f"--num_epochs {int(total)}"]


def _larger_rank(row: dict, floor: float, plan: Plan, target: float) -> list[str]:
    """Return the smallest rank whose best known chain leaves room for the excess of this row, with its floor."""
    assert plan.bounds is not None
    wanted = target - max(row["relative_loss"] - floor, 0.0)
    rank = smallest_ranks(plan, wanted)[1] if wanted > 0 else plan.chain.saturation_rank
    large = ", larger than dense" if plan.chain.parameters(rank) > plan.chain.rows * plan.chain.cols else ""
    return [f"--ranks {rank} (where {shares(plan.bounds.upper(rank))[0]} is possible, a margin for training{large})"]


def _by_front(rows: list[dict]) -> tuple[dict, list[str]]:
    """Return the row that the answer names without a target: an exact rank, else the knee, else the smallest loss."""
    exact = [row for row in rows if row["relative_loss"] < NEGLIGIBLE_FLOOR]
    if exact:
        named = min(exact, key=lambda row: row["parameters"])
        text = f"Rank {named['rank']} is the smallest trained rank that loses nothing: it has {_size(named)}."
        return named, [text]
    bend = knee(rows)
    named = bend or min(rows, key=lambda row: row["relative_loss"])
    if bend is None:
        start = f"Rank {named['rank']} loses least"
        end = "; loss against parameters has no knee, so choose with --target_relative_loss" if len(rows) > 1 else ""
    else:
        start, end = f"Rank {named['rank']} is the knee of loss against parameters", ""
    loss = shares(named["relative_loss"])[0]
    return named, [f"{start}: it loses {loss} of the output energy, with {_size(named)}{end}."]


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

    def cost(row: dict) -> tuple:
        return row["parameters"], row["relative_loss"]

    return [
        other
        for other in rows
        if all(ours <= theirs for ours, theirs in zip(cost(other), cost(row), strict=True))
        and (cost(other) != cost(row) or other["rank"] < row["rank"])
    ]


def _dominated(rows: list[dict]) -> list[str]:
    """Return a sentence for all ranks that another one makes useless."""
    beaten = {row["rank"]: found[0]["rank"] for row in rows if (found := _dominators(row, rows))}
    if not beaten:
        return []
    pairs = ", ".join(f"{rank} by {better}" for rank, better in beaten.items())
    return [f"Dominated, by a rank with no more parameters and no more loss: {pairs}."]


def _bounds_of(row: dict) -> list[str]:
    if row.get("loss_floor_is_exact") in (True, None):
        return []
    lower, upper = shares(row["relative_floor"], row["relative_floor_upper"])
    return [f"No chain of rank {row['rank']} loses less than {lower}; the best known one loses {upper}."]


def _lowrank_beside(row: dict, plan: Plan) -> list[str]:
    """Return the loss that a low-rank factorisation with at most as many parameters can reach."""
    if plan.chain.family == "lowrank" or plan.bounds is None:
        return []
    ((rank, floor),) = plan.lowrank_floors([row["parameters"]])
    loss, ours = shares(floor, row["relative_loss"])
    advice = "; sweep --chain lowrank as well" if floor < row["relative_loss"] else ""
    start = f"A low-rank factorisation of the same size (rank {rank}) gets down to {loss}"
    return [f"{start}, against {ours} here{advice}."]


def _warnings(row: dict, target: float | None) -> list[str]:
    """Return the size of the named rank if it is too large, its time, and held-out inputs that lose more."""
    rank, sentences = row["rank"], []
    if row["compression_ratio"] < 1:
        sentences.append(f"WARNING: rank {rank} has more parameters than the dense weight.")
    ratios = {
        batch: times[0] / times[1] for batch in measured_batches([row]) if (times := times_of(row, batch)) is not None
    }
    if ratios:
        slower = "WARNING: " if max(ratios.values()) > 1 else ""
        texts = [f"{ratio:.2f} at batch {batch}" for batch, ratio in ratios.items()]
        sentences.append(f"{slower}Time of rank {rank} over that of the dense weight here: {', '.join(texts)}.")
    held_out = row.get("held_out_relative_loss")
    if target is not None and held_out is not None and row["relative_loss"] <= target < held_out:
        loss, limit = shares(held_out, target)
        sentences.append(f"WARNING: on held-out inputs, rank {rank} loses {loss}, more than {limit}.")
    return sentences


def _size(row: dict) -> str:
    return f"{shares(row['share_of_dense'])[0]} of the parameters of the dense weight"
