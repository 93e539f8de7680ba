"""A study as tables, for the figures."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from ks.errors import one_line
from ks.files import columns
from ks.files.schema import StudyRecord
from ks.files.status import ended_well

MEAN_SQUARED_ERROR = "mean squared error per output"


def loss_label(config: StudyRecord | None) -> str:
    """Return the label of a study's losses: MEAN_SQUARED_ERROR for the toolkit's own criterion, and for no other.

    Args:
        config: of the study; None for a 2025 folder.
    """
    criterion = config.settings.get("criterion") if config else None
    if criterion is None:  # an earlier version, whose config may hold the label itself
        return (config and config.loss) or MEAN_SQUARED_ERROR
    if criterion == "mean_squared_error":
        return MEAN_SQUARED_ERROR
    name = re.sub(r" (of \S+ [\d.]+|sha256 [0-9a-f]+)$", "", str(criterion))
    return f"loss, {one_line(name, 40)}"


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
    loss_label: str = MEAN_SQUARED_ERROR
    answer: tuple[str, ...] = ()
    predict_zero_loss: float | None = None
    held_out_predict_zero_loss: float | None = None
    target: float | None = None
    config: StudyRecord | None = None

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that have a value in any epoch."""
        known = {*columns.names(columns.CURVES), "seed"}
        return [name for name in self.curves if name not in known and self.curves[name].notna().any()]

    def unknown_metrics(self, asked: Iterable[str]) -> str:
        """Return a line that lists the metrics that were asked for but have no values; empty if there are none."""
        unknown = [name for name in asked if name not in self.metrics]
        if not unknown:
            return ""
        known = f"it has {', '.join(self.metrics)}" if self.metrics else "it has no metrics at all"
        return f"--metric {' '.join(unknown)}: no run of {self.name} has values of that name; {known}"


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
    """Return the rows of the summary with all its columns, in their order, and those of metrics after them."""
    names = [*columns.names(columns.SUMMARY), *columns.summary_metrics(rows)]
    return pd.DataFrame([{name: row.get(name) for name in names} for row in rows])
