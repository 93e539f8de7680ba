"""What the bounds say about the rank that a study names: certified within a time, and recorded for the answer."""

from ks.bounds.rank_floors import RankFloors
from ks.report.answer import Facts, named_row

DEFAULT_SECONDS = 30.0  # for the lower bounds of the ranks that the answer names


def spoken_of(rows: list[dict], floors: RankFloors, target: float | None) -> list[int]:
    """Return the ranks whose lower bounds the answer depends on, most important first.

    They are the rank below the smallest one that is known to reach the target, for then no smaller rank can if its
    bound is above the target, and the rank that the answer names, whose verdict is about the distance to its floor.
    """
    named = named_row(rows, target)
    if named is None or not floors.has_floors:
        return []
    ranks = [named["rank"]]
    if target is not None:
        found = floors.target_ranks(target)
        reaching = min(found.reaching, named["rank"]) if named["relative_loss"] <= target else found.reaching
        if found.none_below < reaching:
            ranks.insert(0, reaching - 1)
    return ranks


def certify(floors: RankFloors, spoken: list[int], ranks: list[int], seconds: float) -> None:
    """Spend up to 30 seconds on the lower bounds of the ranks that are spoken of, and what is left on those of all.

    Args:
        floors: to improve.
        spoken: as `spoken_of` returns them.
        ranks: of the study.
        seconds: of --tight_bounds.
    """
    floors.certify(spoken, min(seconds, DEFAULT_SECONDS))
    if seconds > DEFAULT_SECONDS:
        floors.certify([*spoken, *ranks], seconds - DEFAULT_SECONDS, tight=True)


def find_facts(rows: list[dict], floors: RankFloors, target: float | None, seconds: float) -> Facts:
    """Return the facts of a study; no lower bound is computed.

    Args:
        rows: of the summary, with the floors as they are known now.
        floors: of the study.
        target: fraction of the output energy that may be lost, or None.
        seconds: of --tight_bounds.
    """
    named = named_row(rows, target)
    if named is None or not floors.has_floors:
        return Facts()
    lowrank = {}
    if floors.chain.family != "lowrank":
        lowrank = {row["rank"]: floors.lowrank_beside(floors.chain.parameters(row["rank"])) for row in rows}
    uncertified = tuple(floors.uncertified(spoken_of(rows, floors, target)))
    if target is None:
        return Facts(lowrank, uncertified=uncertified, seconds=seconds)
    found, remedy = floors.target_ranks(target), None
    if named["relative_loss"] > target and named["relative_floor_upper"] is not None:
        # The best known chain of the remedy leaves room for an excess as large as that of the named rank.
        wanted = target - max(named["relative_loss"] - named["relative_floor_upper"], 0.0)
        rank = floors.target_ranks(wanted).reaching if wanted > 0 else floors.chain.saturation_rank
        larger_than_dense = floors.chain.parameters(rank) > floors.chain.rows * floors.chain.cols
        remedy = (rank, floors.upper(rank), larger_than_dense)
    return Facts(lowrank, found, remedy, uncertified, seconds)
