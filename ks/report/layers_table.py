"""The results of several layers as text."""

from collections.abc import Callable

import pandas as pd

COLUMNS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "layer": ("layer", str),
    "rank": ("rank", str),
    "parameters": ("parameters", str),
    "relative_loss": ("energy lost", "{:.2%}".format),
    "floor": ("floor", "{:.2%}".format),
    "verdict": ("verdict", str),
}


def layers_table(rows: list[dict]) -> str:
    """Return one line for each layer and rank.

    Args:
        rows: of the summary, with the columns of `ks.files.columns.LAYERS_SUMMARY`.
    """
    lines = []
    for row in rows:
        values = row | {"floor": _relative_floor(row), "verdict": row.get("verdict") or row["status"]}
        lines.append(
            {
                header: "-" if pd.isna(values.get(name)) else show(values[name])
                for name, (header, show) in COLUMNS.items()
            }
        )
    return pd.DataFrame(lines).to_string(index=False)


def _relative_floor(row: dict) -> float | None:
    """Return what the best known chain loses, as a share of the output energy."""
    if row.get("excess") is None or row.get("relative_loss") is None:
        return None
    return row["relative_loss"] - row["excess"]
