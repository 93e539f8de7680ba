"""The plan as a table, for --dry_run: what each rank costs and can reach."""

import torch

from ks.bounds.floors import Floor
from ks.patterns import Chain


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
