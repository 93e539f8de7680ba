"""Tables for people: the plan before a sweep and the summary after it, as text."""

import pandas as pd

from ks.factorize import Floor
from ks.patterns import Chain
from ks.plan import Plan


def plan_notes(plan: Plan, target: float | None = None) -> list[str]:
    """Saturation, parity with dense and, for a target, the smallest rank that can reach it, one sentence each."""
    chain = plan.chain
    notes = [f"saturation: from rank {chain.saturation_rank} on, more rank changes nothing"]
    parity = chain.parity_rank()
    notes += [f"parity: from rank {parity} on, the chain has as many parameters as the dense weight"] if parity else []
    if plan.reason is not None:
        return [*notes, f"no floor: {plan.reason}"]
    if target is None:
        return notes
    lower, upper = plan.smallest_ranks(target)
    if lower == upper:
        notes.append(f"target {target:g}: rank {lower} is the smallest that reaches it")
    else:
        notes.append(f"target {target:g}: no rank below {lower} can reach it; the factorisation does at rank {upper}")
    return notes


def plan_table(chain: Chain, ranks: list[int], floors: list[Floor | None], predict_zero: float) -> str:
    """What each rank costs and can reach: parameters, share of dense, relative floor, patterns, remarks.

    Args:
        chain: the family.
        ranks: to list.
        floors: one per rank, in the units of `predict_zero`, or None.
        predict_zero: loss of predicting 0.
    """
    dense = chain.rows * chain.cols
    rows = []
    for index, rank in enumerate(ranks):
        parameters = chain.parameters(rank)
        row = {"rank": rank, "parameters": parameters, "share of dense": f"{parameters / dense:.2%}"}
        if floors[index] is not None:
            lower, upper = (f"{bound / predict_zero:.4g}" for bound in (floors[index].lower, floors[index].upper))
            row["relative floor"] = lower if floors[index].exact else f"{lower} to {upper}"
        row["patterns (a, b, c, d)"] = " ".join(map(str, chain.patterns(rank)))
        marks = ["saturated"] * (rank >= chain.saturation_rank) + ["larger than dense"] * (parameters > dense)
        rows.append(row | {"remarks": ", ".join(marks)})
    return pd.DataFrame(rows).to_string(index=False)


# Column of the summary: header and format in the printed table.
PRINTED = {
    "rank": ("rank", "{}"),
    "parameters": ("parameters", "{:.0f}"),
    "compression_ratio": ("compression", "{:.2f}x"),
    "final_train_loss": ("train loss", "{:.4g}"),
    "final_val_loss": ("validation loss", "{:.4g}"),
    "population_loss": ("population loss", "{:.4g}"),
    "loss_floor": ("floor", "{:.4g}"),
    "loss_floor_upper": ("upper bound", "{:.4g}"),
    "optimality_gap": ("gap", "{:.2%}"),
    "excess": ("excess", "{:.3%}"),
    "relative_loss": ("relative loss", "{:.2%}"),
    "min_val_epoch": ("best epoch", "{:.0f}"),
    "num_epochs": ("epochs", "{:.0f}"),
    "train_seconds": ("seconds", "{:.1f}"),
    "status": ("status", "{}"),
    "verdict": ("verdict", "{}"),
}


def summary_table(rows: list[dict]) -> str:
    """The summary of a study, one line per rank, without columns that no rank has or that say nothing."""
    printed = dict(PRINTED)
    if all(row.get("loss_floor_is_exact") in (True, None) for row in rows):
        del printed["loss_floor_upper"]
    table = {
        header: ["-" if pd.isna(row.get(name)) else text.format(row[name]) for row in rows]
        for name, (header, text) in printed.items()
        if any(not pd.isna(row.get(name)) for row in rows)
    }
    return pd.DataFrame(table).to_string(index=False)
