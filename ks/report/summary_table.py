"""The summary of a study as text."""

import pandas as pd

from ks.files import columns


def summary_table(rows: list[dict]) -> str:
    """Return the summary of a study, one line for each rank, without columns that are empty or say nothing."""
    declared = {column.name: column for column in columns.SUMMARY}
    printed = [declared[name] for name in columns.PRINTED]
    if all(row.get("loss_floor_is_exact") in (True, None) for row in rows):
        printed.remove(declared["loss_floor_upper"])
    table = {
        column.header: ["-" if pd.isna(row.get(column.name)) else column.form.format(row[column.name]) for row in rows]
        for column in printed
        if any(not pd.isna(row.get(column.name)) for row in rows)
    }
    return pd.DataFrame(table).to_string(index=False)
