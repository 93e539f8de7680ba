"""The tables that a terminal shows: the summary of a study, the results of several layers, the plan of --dry_run."""

from ks.files import columns
from ks.files.columns import Column, chosen
from ks.files.status import OK
from ks.files.table import is_missing, table


def summary_columns(rows: list[dict]) -> list[Column]:
    """Return the columns of a summary that decide, without those that say nothing about these rows.

    Where no relative loss is known, the final losses take its place.

    Args:
        rows: of the summary.
    """
    order = list(columns.PRINTED)
    if all(row.get("loss_floor_is_exact") is not False for row in rows):
        order.remove("relative_floor_upper")
    if all(str(row.get("status")) in (str(OK), "None") for row in rows):
        order.remove("status")
    if all(is_missing(row.get("relative_loss")) for row in rows):  # of another criterion, or of the scripts of 2025
        order[1:1] = ["final_val_loss", "final_train_loss"]
    return chosen(columns.SUMMARY, order)


def summary_table(rows: list[dict], verbose: bool = False) -> str:
    """Return the summary of a study, a line for each rank.

    Args:
        rows: of the summary.
        verbose: add the details in further tables.
    """
    shown = table(summary_columns(rows), rows)
    if not verbose:
        return shown
    metrics = [name for name in columns.summary_metrics(rows) if name.startswith(columns.FINAL)]
    details = chosen(columns.SUMMARY, ("rank", *columns.DETAILS))
    return f"{shown}\n\n{table([*details, *columns.metric_columns(metrics)], rows)}"


def layers_table(rows: list[dict]) -> str:
    """Return one line for each layer and rank; a rank without a verdict has its status.

    Args:
        rows: of the summaries of all layers.
    """
    rows = [row | {"verdict": row["verdict"] or row["status"]} for row in rows]
    return table(chosen(columns.SUMMARY, columns.PRINTED_LAYERS), rows)


def plan_table(rows: list[dict], verbose: bool = False) -> str:
    """Return the cost of each rank and the loss it can reach, with low-rank of the same size beside it.

    Args:
        rows: as `ks.bounds.rank_floors.plan_rows` returns them.
        verbose: add the patterns (a, b, c, d).
    """
    shown = table(columns.PLANNED_RANKS, rows)
    return f"{shown}\n\n{table(columns.PATTERNS, rows)}" if verbose else shown
