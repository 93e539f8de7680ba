"""The summary of a study as text."""

from typing import Any

from ks.files import columns
from ks.files.status import OK
from ks.report.text_table import text_table

LEGEND = "relative_loss: share of the output energy lost; relative_floor: the least that the rank can lose."


def summary_table(rows: list[dict], verbose: bool = False) -> str:
    """Return the summary of a study, a line for each rank, without columns that are empty or say nothing.

    Args:
        rows: of the summary.
        verbose: add the details in further tables.
    Where no relative loss is known, the final losses take its place.
    """
    bracketed = any(row.get("loss_floor_is_exact") is False for row in rows)
    silent = set() if bracketed else {"relative_floor_upper", "loss_floor_upper"}
    if all(str(row.get("status")) in (str(OK), "None") for row in rows):
        silent.add("status")
    names: tuple[str, ...] = columns.PRINTED
    if all(_empty(row.get("relative_loss")) for row in rows):  # of another criterion, or of the scripts of 2025
        names = ("rank", "final_val_loss", "final_train_loss", *names[1:])
    decisive = _cells(rows, names, silent)
    parts = [text_table(decisive, "verdict")]
    if "relative_floor" in decisive:
        parts[0] += f"\n{LEGEND}"
    if verbose:
        metrics = [name for name in columns.summary_metrics(rows) if name.startswith(columns.FINAL)]
        parts.append(text_table(_cells(rows, ("rank", *columns.DETAILS, *metrics), silent)))
    return "\n\n".join(parts)


def _cells(rows: list[dict], names: tuple[str, ...], silent: set[str]) -> dict[str, list[str]]:
    """Return the cells of every column with something in it."""
    metrics = columns.metric_columns(columns.summary_metrics(rows))
    declared = {column.name: column for column in (*columns.SUMMARY, *metrics)}
    return {
        name: ["-" if _empty(row.get(name)) else declared[name].form.format(row[name]) for row in rows]
        for name in names
        if name not in silent and any(not _empty(row.get(name)) for row in rows)
    }


def _empty(value: Any) -> bool:
    return value is None or value != value  # NaN
