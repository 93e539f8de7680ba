"""Tables for people: the plan before a sweep and the summary after it, as text."""

import pandas as pd

from ks.patterns import Chain


def plan_table(chain: Chain, ranks: list[int]) -> str:
    """What each rank costs: patterns (output side first), parameters, share of the dense weight's, remarks."""
    dense = chain.rows * chain.cols
    rows = []
    for rank in ranks:
        parameters = chain.parameters(rank)
        remarks = ["saturated"] * (rank > chain.saturation_rank) + ["larger than dense"] * (parameters > dense)
        rows.append(
            {
                "rank": rank,
                "parameters": parameters,
                "share of dense": f"{parameters / dense:.2%}",
                "patterns (a, b, c, d)": " ".join(map(str, chain.patterns(rank))),
                "remarks": ", ".join(remarks),
            }
        )
    return pd.DataFrame(rows).to_string(index=False)


def summary_table(rows: list[dict]) -> str:
    """The summary of a study, one line per rank; columns that no rank has are left out."""
    formats = {
        "rank": ("rank", "{}"),
        "parameters": ("parameters", "{:.0f}"),
        "share_of_dense": ("share of dense", "{:.2%}"),
        "final_train_loss": ("train loss", "{:.4g}"),
        "final_val_loss": ("validation loss", "{:.4g}"),
        "relative_val_loss": ("relative", "{:.2%}"),
        "min_val_loss": ("best", "{:.4g}"),
        "min_val_epoch": ("at epoch", "{:.0f}"),
        "num_epochs": ("epochs", "{:.0f}"),
        "train_seconds": ("seconds", "{:.1f}"),
        "status": ("status", "{}"),
    }
    table = {
        header: ["-" if pd.isna(row.get(name)) else text.format(row[name]) for row in rows]
        for name, (header, text) in formats.items()
        if any(not pd.isna(row.get(name)) for row in rows)
    }
    return pd.DataFrame(table).to_string(index=False)
