"""The plan as text, for --dry_run: what each rank costs and can reach, saturation, parity, the rank for a target."""

import torch

from ks.bounds.floors import Floor
from ks.bounds.moments import IsotropicInputs
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
        text = f"rank {lower} is the smallest that reaches it"
    else:
        text = f"no rank below {lower} can reach it; the best known chain does at rank {upper}"
    kind = "isotropic" if isinstance(plan.inputs, IsotropicInputs) else "the measured"
    notes.append(f"target {target:g}, for {kind} inputs: {text}")
    return notes


def plan_table(chain: Chain, floors: dict[int, Floor | None], isotropic_curve: torch.Tensor | None = None) -> str:
    """Return what each rank costs and can reach: parameters, share of dense, energy lost, patterns, remarks.

    Args:
        chain: the family.
        floors: of every rank to list, relative to predicting 0.
        isotropic_curve: the floor of every rank from 0 on for isotropic inputs, if the inputs were measured.
    """
    import pandas as pd  # here, so that a sweep need not wait for it before its first training

    dense = chain.rows * chain.cols
    rows = []
    for rank, floor in floors.items():
        parameters = chain.parameters(rank)
        row = {"rank": rank, "parameters": parameters, "share of dense": f"{parameters / dense:.2%}"}
        if floor is not None:
            row["energy lost"] = f"{floor.lower:.2%}" if floor.exact else f"{floor.lower:.2%} to {floor.upper:.2%}"
        if isotropic_curve is not None:
            row["if isotropic"] = f"{isotropic_curve[rank:][:1].sum().item():.2%}"
        row["patterns (a, b, c, d)"] = " ".join(map(str, chain.patterns(rank)))
        marks = ["saturated"] * (rank >= chain.saturation_rank) + ["larger than dense"] * (parameters > dense)
        rows.append(row | {"remarks": ", ".join(marks)})
    return pd.DataFrame(rows).to_string(index=False)
