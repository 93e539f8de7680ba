"""A results folder, ours or one of the 2025 ksmm scripts, as a study: tables for figures, and units of its losses."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from ks.errors import UsageError, one_line
from ks.files import columns
from ks.files.curves import read_curves
from ks.files.layout import SweepFiles, find_runs
from ks.files.rows import read_summary, read_table
from ks.files.schema import StudyRecord, read_json_as
from ks.files.status import OK, ended_well
from ks.files.table import is_missing
from ks.report.summary import rank_row, run_row, written_columns
from ks.report.words import Words

MEAN_SQUARED_ERROR = "mean squared error per output"
FLOOR_NAMES = columns.names(columns.FLOOR)


@dataclass(frozen=True)
class Units:
    """Divisors of the losses of a study, and the name of the result.

    train, validation: loss of the zero predictor on the inputs that each kind of loss is measured on, in the unit of
    the losses; 1 where the losses stay as they are. label: of an axis. zero: loss of the zero predictor in these
    units; NaN if it is not known, and losses are numbers without `words`.
    """

    train: float
    validation: float
    label: str
    zero: float = math.nan
    words: Words = field(default_factory=Words)

    @property
    def relative(self) -> bool:
        """Whether the loss of the zero predictor is known."""
        return not math.isnan(self.zero)

    @property
    def fractions(self) -> bool:
        """Whether losses are fractions of the output energy."""
        return self.relative and not self.words.of_model

    def show(self, loss: float) -> str:
        """Return a loss of these units as text."""
        return self.words.amounts(loss / self.zero)[0] if self.relative else f"{loss:.3g}"

    def whole(self, loss: float) -> str:
        """Return `show` with what the loss is a part of."""
        return self.words.whole(self.show(loss)) if self.relative else self.show(loss)


@dataclass(frozen=True)
class Study:
    """One sweep.

    curves: one row for each run and epoch (columns of the curves file, and seed). summary: one row for each rank
    (columns of the summary; for a 2025 folder only the losses are filled). floor: columns of the floor file, empty if
    there is no floor. files: that it was read from. config: the config file; that of a 2025 folder is empty.
    """

    name: str
    curves: pd.DataFrame
    summary: pd.DataFrame
    floor: pd.DataFrame
    files: SweepFiles
    config: StudyRecord

    @cached_property
    def rows(self) -> list[dict]:
        """Rows of the summary, with None for a missing value."""
        rows = self.summary.to_dict("records")
        return [{str(name): None if is_missing(value) else value for name, value in row.items()} for row in rows]

    @property
    def target(self) -> float | None:
        """Relative loss that is asked for."""
        return self.rows[0]["target_relative_loss"]

    @cached_property
    def loss_label(self) -> str:
        """Label of the losses: MEAN_SQUARED_ERROR for the toolkit's own criterion, and for no other."""
        criterion = self.config.settings.get("criterion")
        if criterion is None:  # an earlier version, whose config may hold the label itself
            return self.config.loss or MEAN_SQUARED_ERROR
        if criterion == "mean_squared_error":
            return MEAN_SQUARED_ERROR
        name = re.sub(r" (of \S+ [\d.]+|sha256 [0-9a-f]+)$", "", str(criterion))
        return f"loss, {one_line(name, 40)}"

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the metrics that have a value in any epoch."""
        known = {*columns.names(columns.CURVES), "seed"}
        return [name for name in self.curves if name not in known and self.curves[name].notna().any()]

    @cached_property
    def family(self) -> str:
        """Chain of the floors, as it is called in their table."""
        others = [name for name in self.floor["chain"].unique() if name not in ("lowrank", columns.ISOTROPIC)]
        return others[0] if others else "lowrank"

    @cached_property
    def dense_parameters(self) -> float:
        product = self.summary["parameters"].astype(float) * self.summary["compression_ratio"].astype(float)
        return float(product.dropna().iloc[0])

    @cached_property
    def units(self) -> Units:
        """Units of the losses in figures.

        Mean squared errors with a known zero predictor become fractions; increases of the loss of the model stay.
        """
        problem, words = self.config.problem, self.words
        zero = problem.predict_zero_loss
        if self.loss_label != MEAN_SQUARED_ERROR or zero is None:
            return Units(1.0, 1.0, self.loss_label)
        if words.of_model:
            return Units(1.0, 1.0, words.label, zero, words)
        return Units(zero, problem.held_out_predict_zero_loss or zero, words.label, 1.0, words)

    @cached_property
    def words(self) -> Words:
        """Words for the metric of the study."""
        return Words.of(self.rows[0])

    @cached_property
    def losses(self) -> pd.DataFrame:
        """Losses of every rank in `units`, as floats; NaN where unknown.

        Columns: rank, status, train, validation, exact (population loss), best (the exact one, else validation), lower
        and upper (the bounds of its floor), bracketed (whether they differ), train_se, validation_se, parameters.
        """
        rows, units = self.summary.sort_values("rank").reset_index(drop=True), self.units
        losses = pd.DataFrame({"rank": rows["rank"], "status": rows["status"]})
        for name, column, unit in (
            ("train", "final_train_loss", units.train),
            ("validation", "final_val_loss", units.validation),
            ("exact", "population_loss", units.train),
            ("lower", "loss_floor", units.train),
            ("upper", "loss_floor_upper", units.train),
            ("train_se", "final_train_loss_se", units.train),
            ("validation_se", "final_val_loss_se", units.validation),
            ("parameters", "parameters", 1.0),
        ):
            losses[name] = rows[column].astype(float) / unit
        losses["best"] = losses["exact"].fillna(losses["validation"])
        losses["bracketed"] = rows["loss_floor_is_exact"].eq(False)
        losses["upper"] = losses["upper"].where(losses["bracketed"], losses["lower"])
        return losses

    def lowrank_beside(self, parameters: pd.Series) -> pd.DataFrame:
        """Return the largest rank of low-rank with at most so many parameters each, and its floor.

        Args:
            parameters: of chains.
        Returns:
            columns rank and relative_loss, with the index of `parameters`; rank 0, the zero predictor, where none fits.
        """
        lowrank = self.floor[self.floor["chain"] == "lowrank"].sort_values("parameters")
        found = np.searchsorted(lowrank["parameters"], parameters.astype(float), side="right")
        columns = {"rank": [0, *lowrank["rank"]], "relative_loss": [1.0, *lowrank["relative_loss"]]}
        return pd.DataFrame(columns).iloc[found].set_index(parameters.index)

    def unknown_metrics(self, asked: Iterable[str]) -> str:
        """Return a line that lists the metrics that were asked for but have no values; empty if there are none."""
        unknown = [name for name in asked if name not in self.metrics]
        if not unknown:
            return ""
        known = f"it has {', '.join(self.metrics)}" if self.metrics else "it has no metrics at all"
        return f"--metric {' '.join(unknown)}: no run of {self.name} has values of that name; {known}"


def read_study(files: SweepFiles, rows: list[dict] | None = None) -> Study:
    """Read a results folder, ours or one of the 2025 ksmm scripts; its summary says which ranks belong to the study.

    Args:
        files: of the study.
        rows: of its summary, which is not written yet.
    Raises:
        UsageError: no such folder, no results in it, or a file that cannot be read.
    """
    if not files.directory.is_dir():
        raise UsageError(f"{files.directory}: no such folder")
    config = read_json_as(files.config, StudyRecord) if files.config.exists() else StudyRecord({}, [], [])
    found = [run for run in find_runs(files.directory, *config.seeds[:1]) if run[2].curves_csv.is_file()]
    rows = _summary_rows(files) if rows is None else rows
    if not found and not rows:
        raise UsageError(f"{files.directory} holds no results (no rank_R/rank_R_rank_R_loss_curves.csv in it)")
    is_ours, ranks = config.seeds and rows, {row["rank"] for row in rows}
    if is_ours:
        found = [(rank, seed, run) for rank, seed, run in found if rank in ranks and seed in config.seeds]
    runs = [(rank, seed, read_curves(run.curves_csv, rank)) for rank, seed, run in found]
    if not is_ours:  # of the 2025 scripts, whose summary has no more than the curves
        by_rank: dict[int, list[dict]] = {}
        for rank, seed, curves in runs:
            by_rank.setdefault(rank, []).append(run_row(rank, curves, OK, seed))
        rows = [*map(rank_row, by_rank.values())]
    floors = read_table(files.floor_csv, columns.FLOOR, FLOOR_NAMES) if files.floor_csv.is_file() else []
    summary, floor = pd.DataFrame(rows, columns=written_columns(rows)), pd.DataFrame(floors, columns=FLOOR_NAMES)
    return Study(files.directory.name, _drawn_curves(files, rows, runs), summary, floor, files, config)


def _summary_rows(files: SweepFiles) -> list[dict]:
    """Return the rows of the summary; none if there is no summary at all.

    Raises:
        UsageError: the summary of this prefix is missing but others exist, or it is not valid.
    """
    if files.summary_json.exists():
        return read_summary(files.summary_json)
    others = sorted(path.name.removesuffix("_summary.json") for path in files.directory.glob("*_summary.json"))
    if others:
        raise UsageError(f"{files.directory} has no {files.summary_json.name}; give --save_prefix: {', '.join(others)}")
    return []


def read_runs(files: SweepFiles, rows: list[dict]) -> list[dict]:
    """Return rank, seed, status and seconds of every run; for a folder without the runs file, the rows of its ranks."""
    if not files.runs_csv.is_file():
        return rows
    needed = ("rank", "seed", "status")
    return read_table(files.runs_csv, columns.chosen(columns.RUNS, (*needed, "train_seconds")), needed)


def _drawn_curves(files: SweepFiles, rows: list[dict], runs: list[tuple[int, int | None, list[dict]]]) -> pd.DataFrame:
    """Return the curves to draw, with their seeds: failed runs only for ranks of which no seed finished."""
    status_of = {(run["rank"], run.get("seed")): run["status"] for run in read_runs(files, rows)}
    ranks = {row["rank"]: row["status"] for row in rows}
    well = {(rank, seed) for rank, seed, _ in runs if ended_well(status_of.get((rank, seed), ranks[rank]))}
    finished = {rank for rank, _ in well}
    drawn = [run for run in runs if run[:2] in well or run[0] not in finished]
    return pd.DataFrame([epoch | {"seed": seed} for _, seed, curves in drawn for epoch in curves])
