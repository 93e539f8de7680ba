"""The plan as text, for --dry_run: what each rank costs and can reach, saturation, parity, the rank for a target."""

import pandas as pd

from ks.bounds.floors import Floor
from ks.bounds.plan import Plan
from ks.bounds.target_rank import smallest_ranks
from ks.patterns import Chain


def plan_notes(plan: Plan, target: float | None = None) -> list[str]:
    """Return saturation, parity with dense and the smallest rank for a target, one sentence each.

    Args:
        plan: of a chain family.
        target: loss relative to predicting 0, or None.
    """
    chain = plan.chain
    notes = [f"saturation: from rank {chain.saturation_rank} on, more rank changes nothing"]
    parity = chain.parity_rank()
    notes += [f"parity: from rank {parity} on, the chain has as many parameters as the dense weight"] if parity else []
    if plan.reason is not None:
        return [*notes, f"no floor: {plan.reason}"]
    if target is None:
        return notes
    lower, upper = smallest_ranks(plan, target)
    if lower == upper:
        notes.append(f"target {target:g}: rank {lower} is the smallest that reaches it")
    else:
        notes.append(f"target {target:g}: no rank below {lower} can reach it; the factorisation does at rank {upper}")
    return notes


def plan_table(chain: Chain, floors: dict[int, Floor | None]) -> str:
    """Return what each rank costs and can reach: parameters, share of dense, relative floor, patterns, remarks.

    Args:
        chain: the family.
        floors: of every rank to list, relative to predicting 0.
    """
    dense = chain.rows * chain.cols
    rows = []
    for rank, floor in floors.items():
        parameters = chain.parameters(rank)
        row = {"rank": rank, "parameters": parameters, "share of dense": f"{parameters / dense:.2%}"}
        if floor is not None:
            row["relative floor"] = f"{floor.lower:.4g}" if floor.exact else f"{floor.lower:.4g} to {floor.upper:.4g}"
        row["patterns (a, b, c, d)"] = " ".join(map(str, chain.patterns(rank)))
        marks = ["saturated"] * (rank >= chain.saturation_rank) + ["larger than dense"] * (parameters > dense)
        rows.append(row | {"remarks": ", ".join(marks)})
    return pd.DataFrame(rows).to_string(index=False)
