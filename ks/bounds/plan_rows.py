"""The floors of a plan as rows of the tables that a file and a terminal show."""

from typing import Any

from ks.bounds.floors import Floor
from ks.bounds.plan import Plan
from ks.files.columns import ISOTROPIC


def floor_rows(plan: Plan, predict_zero_loss: float) -> list[dict]:
    """Return the floors of every rank, of the chain and for comparison, as rows of `ks.files.columns.FLOOR`.

    Args:
        plan: of a chain family.
        predict_zero_loss: loss of the zero predictor, in the unit of the file.
    """
    curves = [(chain.family, chain, curve) for chain, curve in plan.family_curves()]
    if plan.isotropic_curve is not None:
        curves.append((ISOTROPIC, plan.chain, plan.isotropic_curve))
    return [
        {
            "chain": name,
            "rank": rank,
            "parameters": chain.parameters(rank),
            "loss_floor": relative * predict_zero_loss,
            "relative_loss": relative,
        }
        for name, chain, curve in curves
        for rank, relative in enumerate(curve.tolist())
        if rank > 0
    ]


def plan_rows(plan: Plan, floors: dict[int, Floor | None]) -> list[dict]:
    """Return the cost of every rank and the loss it can reach, as rows of `ks.files.columns.PLANNED_RANKS`.

    Args:
        plan: of a chain family.
        floors: of every rank to list, relative to the zero predictor.
    """
    chain, dense = plan.chain, plan.chain.rows * plan.chain.cols
    rows = []
    for rank, floor in floors.items():
        parameters = chain.parameters(rank)
        marks = ["saturated"] * (rank >= chain.saturation_rank) + ["larger than dense"] * (parameters > dense)
        row: dict[str, Any] = {"rank": rank, "parameters": parameters, "share_of_dense": parameters / dense}
        row |= {"remarks": ", ".join(marks), "patterns": " ".join(map(str, chain.patterns(rank)))}
        if floor is not None:
            row |= {"relative_floor": floor.lower, "relative_floor_upper": None if floor.exact else floor.upper}
        if plan.bounds is not None and chain.family != "lowrank":
            ((row["lowrank_rank"], row["lowrank_floor"]),) = plan.lowrank_floors([parameters])
        if plan.isotropic_curve is not None:
            row["isotropic_floor"] = plan.isotropic_curve[rank:][:1].sum().item()
        rows.append(row)
    return rows
