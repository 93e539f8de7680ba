"""The plan as a table, for --dry_run: what each rank costs and can reach."""

from ks.bounds.floors import Floor
from ks.bounds.rank_floors import RankFloors, TargetRanks
from ks.report.text_table import text_table

LEGEND = "relative_floor: the least fraction of the output energy that a chain of the rank can lose."
LOWRANK = "lowrank_floor: the same for plain low-rank with at most as many parameters, of rank lowrank_rank."


def plan_table(plan: RankFloors, floors: dict[int, Floor | None], verbose: bool = False) -> str:
    """Return what each rank can reach and costs, and plain low-rank with at most as many parameters beside it.

    Args:
        plan: of a chain family.
        floors: of every rank to list, relative to predicting 0.
        verbose: add the patterns (a, b, c, d).
    """
    chain, dense = plan.chain, plan.chain.rows * plan.chain.cols
    cells: dict[str, list[str]] = {"rank": list(map(str, floors))}
    if plan.has_floors:
        cells["relative_floor"] = [_range(floor) for floor in floors.values() if floor is not None]
    if plan.has_floors and chain.family != "lowrank":
        lowrank = [plan.lowrank_beside(chain.parameters(rank)) for rank in floors]
        cells["lowrank_floor"] = [f"{floor:.2%}" for _, floor in lowrank]
        cells["lowrank_rank"] = [str(rank) for rank, _ in lowrank]
    if plan.isotropic_curve is not None:
        cells["isotropic_floor"] = [f"{plan.isotropic_curve[rank:][:1].sum().item():.2%}" for rank in floors]
    parameters = {rank: chain.parameters(rank) for rank in floors}
    cells["parameters"] = list(map(str, parameters.values()))
    cells["share_of_dense"] = [f"{count / dense:.2%}" for count in parameters.values()]
    marks = {rank: ["saturated"] * (rank >= chain.saturation_rank) for rank in floors}
    remarks = [", ".join(marks[rank] + ["larger than dense"] * (parameters[rank] > dense)) for rank in floors]
    if any(remarks):
        cells["remarks"] = remarks
    parts = [text_table(cells, "remarks")]
    if "relative_floor" in cells:
        parts[0] += f"\n{LEGEND}" + (f"\n{LOWRANK}" if "lowrank_floor" in cells else "")
    if verbose:
        patterns = [" ".join(map(str, chain.patterns(rank))) for rank in floors]
        parts.append(text_table({"rank": cells["rank"], "patterns (a, b, c, d)": patterns}, "patterns (a, b, c, d)"))
    return "\n\n".join(parts)


def _range(floor: Floor) -> str:
    return f"{floor.lower:.2%}" if floor.exact else f"{floor.lower:.2%} to {floor.upper:.2%}"


def target_note(found: TargetRanks, isotropic: bool) -> str:
    """Return the ranks around a target as a sentence.

    Args:
        found: by the bounds that are known before any run.
        isotropic: whether the inputs are.
    """
    reaching = f"rank {found.reaching} is the smallest"
    if found.exact or found.none_below == found.reaching:
        text = f"{reaching} that reaches it"
    else:
        text = f"{reaching} whose best known chain reaches it; no rank below {found.none_below} can"
    return f"target {found.target:g}, for {'isotropic' if isotropic else 'the measured'} inputs: {text}"
