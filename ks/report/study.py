"""A study as tables, for the figures."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from ks.files import columns
from ks.files.schema import SweepConfig
from ks.files.status import ended_well
from ks.report._kind import LossKind


@dataclass(frozen=True)
class Study:
    """One sweep.

    curves: one row for each run and epoch (columns of the curves file, and seed). summary: one row for each rank
    (columns of the summary; for a 2025 folder only the losses are filled). floor: columns of the floor file, empty if
    there is no floor. title: weight and chain, None if not known. answer: sentences of `ks.report.answer`.
    predict_zero_loss, held_out_predict_zero_loss: loss of predicting 0, in the unit of the losses, on the inputs of the
    training and on those held out. target: the share of the output energy that may be lost. config: the config file;
    None for a 2025 folder.
    """

    name: str
    curves: pd.DataFrame
    summary: pd.DataFrame
    floor: pd.DataFrame
    title: str | None = None
    chain: str | None = None
    weight_sha256: str | None = None
    loss_label: str = LossKind.MEAN_SQUARED_ERROR.value
    answer: tuple[str, ...] = ()
    predict_zero_loss: float | None = None
    held_out_predict_zero_loss: float | None = None
    target: float | None = None
    config: SweepConfig | None = None


def curves_table(runs: Iterable[tuple[dict, list[dict]]]) -> pd.DataFrame:
    """Return the curves to draw: failed runs only for ranks of which no seed finished.

    Args:
        runs: for each run its row (rank, seed, status) and its curves.
    """
    runs = list(runs)
    well = {row["rank"] for row, _ in runs if ended_well(row["status"])}
    drawn = [run for run in runs if ended_well(run[0]["status"]) or run[0]["rank"] not in well]
    return pd.DataFrame([epoch | {"seed": row["seed"]} for row, curves in drawn for epoch in curves])


def summary_frame(rows: list[dict]) -> pd.DataFrame:
    """Return the rows of the summary with all its columns, in their order."""
    return pd.DataFrame([{name: row.get(name) for name in columns.names(columns.SUMMARY)} for row in rows])
