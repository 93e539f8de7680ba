"""The results of several layers as text."""

import pandas as pd

from ks.files.columns import SUMMARY
from ks.report.text_table import text_table

COLUMNS = ("weight_key", "rank", "relative_loss", "relative_floor_upper", "share_of_dense", "verdict")


def layers_table(rows: list[dict]) -> str:
    """Return one line for each layer and rank; a rank without a verdict has its status.

    Args:
        rows: of the summaries of all layers.
    """
    declared = {column.name: column for column in SUMMARY}
    table = {}
    for name in COLUMNS:
        values = [row.get(name) for row in rows]
        if name == "verdict":
            values = [value or row["status"] for value, row in zip(values, rows)]
        table[name] = ["-" if pd.isna(value) else declared[name].form.format(value) for value in values]
    return text_table(table, wrapped="verdict")
