"""The summary of a study: losses of a rank over its seeds, distance to the floor, verdict, time; as file and table."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ks.bounds.floors import Floor
from ks.chain.patterns import Chain
from ks.files import columns
from ks.files.atomic import finite, write_csv, write_json
from ks.files.columns import BATCHES, BEST, FINAL, LATENCIES, SUMMARY, Column, chosen, names, summary_metrics
from ks.files.layout import SweepFiles
from ks.files.schema import TrainingLog
from ks.files.status import OK, Ending, Status, ended_well
from ks.files.table import is_missing, table
from ks.report.verdict import NEGLIGIBLE_FLOOR, ROUNDING, Mark, is_calibration_limited, limit_of
from ks.report.words import Words

FINAL_LOSSES = ("final_train_loss", "final_val_loss", "population_loss")  # with standard errors over seeds
AVERAGED = (*FINAL_LOSSES, "min_train_loss", "min_val_loss", *columns.EFFECTS, *names(LATENCIES))
NO_LOG = TrainingLog("")


def run_row(
    rank: int, curves: list[dict], ending: Ending = OK, seed: int | None = None, log: TrainingLog = NO_LOG
) -> dict:
    """Return the row of one run, with the keys of `ks.files.columns.RUNS`, its latencies and its metrics.

    Losses and metrics are None if a curve has no finite value; final ones also if the run has not finished. The best
    value of a metric is that of the epoch with the lowest validation loss.

    Args:
        rank: of the run.
        curves: its rows, possibly none.
        ending: of the run.
        seed: of the run.
        log: of the run; its losses count once the run has ended well.
    """
    row: dict[str, Any] = {"rank": rank, "seed": seed, "num_epochs": len(curves), "status": ending}
    row["train_seconds"] = log.train_seconds
    row |= {name: getattr(log, name) if ended_well(ending) else None for name in columns.EFFECTS}
    lengths = Counter(int(entry.get("segment", 1)) for entry in curves)
    row["segments"] = " + ".join(str(lengths[number]) for number in sorted(lengths)) or None
    for split in ("train", "val"):
        values = [(entry[f"{split}_loss"], entry["epoch"]) for entry in curves if math.isfinite(entry[f"{split}_loss"])]
        best, epoch = min(values, default=(None, None))
        row |= {f"min_{split}_loss": best, f"min_{split}_epoch": epoch}
    last = curves[-1] if curves and ended_well(ending) else {}
    for name in FINAL_LOSSES:
        row[name] = finite(last.get(name.removeprefix("final_")))
    chosen: dict = next((entry for entry in curves if entry["epoch"] == row["min_val_epoch"]), {})
    for metric in columns.metric_names(curves):
        row |= {f"{FINAL}{metric}": finite(last.get(metric)), f"{BEST}{metric}": finite(chosen.get(metric))}
    return row | {name: getattr(log.latency, name, None) for name in names(LATENCIES)}


@dataclass(frozen=True)
class Reference:
    """Reference values for the losses of a study.

    predict_zero_loss: loss of the zero predictor in the unit of the losses. held_out_predict_zero_loss,
    held_out_count: that of held-out inputs, and their number; None and 0 if there are none. isotropic_floors: of every
    rank from 0 on, relative, if the inputs were measured. target: relative loss that is asked for, or None.
    identity: the columns that are the same in every row and keep studies apart.
    """

    predict_zero_loss: float = 1.0
    held_out_predict_zero_loss: float | None = None
    held_out_count: int = 0
    isotropic_floors: Sequence[float] | None = None
    target: float | None = None
    identity: Mapping[str, str | None] = field(default_factory=dict)


def rank_row(
    runs: list[dict], chain: Chain | None = None, floor: Floor | None = None, reference: Reference = Reference()
) -> dict:
    """Return the row of one rank: means over its finished seeds, and the comparison with its floor.

    Args:
        runs: rows of `run_row` for one rank, one for each seed.
        chain: for parameters and saturation; None if it is not known.
        floor: of that rank, relative to the zero predictor; None if there is none.
        reference: of the study.
    Returns:
        a dict with the keys of `ks.files.columns.SUMMARY` and the means of the metrics, None where nothing is known;
        and `failed`, whether a run ended badly and neither was interrupted nor waits for its start.
    """
    predict_zero = reference.predict_zero_loss
    finished = [run for run in runs if ended_well(run["status"])]
    good = finished or runs
    row: dict[str, Any] = dict.fromkeys(names(SUMMARY))
    row |= {name: good[0][name] for name in ("rank", "min_train_epoch", "min_val_epoch", "num_epochs", "segments")}
    row |= {"num_seeds": len(finished), "train_seconds": _mean([run["train_seconds"] for run in runs])}
    row |= {name: _mean([run.get(name) for run in good]) for name in (*AVERAGED, *summary_metrics(runs))}
    row |= {f"{name}_se": _standard_error([run[name] for run in good]) for name in FINAL_LOSSES}
    if row["population_loss_se"] is not None:
        row["relative_loss_se"] = row["population_loss_se"] / predict_zero
    row |= {"predict_zero_loss": predict_zero, "target_relative_loss": reference.target, **reference.identity}
    row["status"] = _joint_ending(runs)
    row["failed"] = row["status"].status not in (Status.OK, Status.INTERRUPTED, Status.NOT_STARTED)
    if chain is None:  # of the 2025 scripts, which computed nothing to compare
        return row
    row["parameters"] = chain.parameters(row["rank"])
    row["compression_ratio"] = chain.rows * chain.cols / row["parameters"]
    row["share_of_dense"] = 1 / row["compression_ratio"]
    row["saturated"] = row["rank"] >= chain.saturation_rank
    if floor is not None:
        upper = floor.lower if floor.exact else floor.upper
        row |= {"relative_floor": floor.lower, "relative_floor_upper": upper}
        row |= {"loss_floor": floor.lower * predict_zero, "loss_floor_upper": upper * predict_zero}
        row["loss_floor_is_exact"] = floor.exact
    if not finished:
        return row
    limit, better, calibration_limited = None, False, False
    if row["population_loss"] is not None:
        relative = row["relative_loss"] = row["population_loss"] / predict_zero
        if reference.target is not None:
            row["reached_target"] = relative <= reference.target
        if floor is not None:
            row |= _distance(relative, floor)
            if reference.isotropic_floors is not None:
                row["isotropic_floor"] = float(sum(reference.isotropic_floors[row["rank"] :][:1]))
            limit = limit_of(relative, row["final_train_loss"] / predict_zero, floor, Words.of(row).small)
            better = not floor.exact and row["excess"] < -ROUNDING
        if reference.held_out_predict_zero_loss and row["final_val_loss"] is not None:
            held_out = row["held_out_relative_loss"] = row["final_val_loss"] / reference.held_out_predict_zero_loss
            calibration_limited = is_calibration_limited(relative, held_out, reference.held_out_count)
    marks = {
        Mark.SATURATED: row["saturated"],
        Mark.LARGER_THAN_DENSE: row["compression_ratio"] < 1,
        Mark.BETTER: better,
        Mark.CALIBRATION_LIMITED: calibration_limited,
    }
    row["verdict"] = ", ".join([*filter(None, [limit]), *(mark for mark in marks if marks[mark])]) or None
    return row


def _joint_ending(runs: list[dict]) -> Ending:
    bad = [run["status"] for run in runs if not ended_well(run["status"])]
    if not bad or len(runs) == 1:
        return runs[0]["status"]
    detail = f"{bad[0].detail}; " if bad[0].detail else ""
    return Ending(bad[0].status, f"{detail}{len(bad)} of {len(runs)} seeds")


def _distance(relative: float, floor: Floor) -> dict:
    """Return the columns that compare a relative population loss with the best known chain; an exact floor is one."""
    least = 0.0 if floor.exact else -math.inf  # less than an exact floor is rounding
    return {
        "excess": max(least, relative - floor.upper),
        "optimality_gap": max(least, relative / floor.upper - 1) if floor.upper >= NEGLIGIBLE_FLOOR else None,
        "removed_share": (1 - relative) / (1 - floor.upper) if floor.upper < 1 else 1.0,
    }


def _mean(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _standard_error(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None


def times_of(row: dict, other: str = "dense") -> dict[int, tuple[float, float]]:
    """Return the milliseconds of the chain and of "dense" or "lowrank" at every batch size at which both are known."""
    name = "latency_ms_batch_{}".format
    times: dict[int, Any] = {batch: (row.get(name(batch)), row.get(f"{other}_{name(batch)}")) for batch in BATCHES}
    return {batch: pair for batch, pair in times.items() if not any(map(is_missing, pair))}


def measured_batches(rows: list[dict]) -> list[int]:
    """Return the batch sizes at which the times of a rank and of dense are known."""
    return [batch for batch in BATCHES if any(batch in times_of(row) for row in rows)]


def written_columns(rows: list[dict]) -> list[str]:
    """Return the names of the columns of the summary, with those of every metric that any row has."""
    return [*names(SUMMARY), *summary_metrics(rows)]


def write_summary(files: SweepFiles, rows: list[dict]) -> None:
    """Write the rows of all ranks as CSV and JSON."""
    written = written_columns(rows)
    write_csv(files.summary_csv, written, rows)
    write_json(files.summary_json, [{name: row.get(name) for name in written} for row in rows])


def has_several_layers(rows: list[dict]) -> bool:
    """Return whether rows are of several weights of a checkpoint."""
    return len({row.get("weight_key") for row in rows}) > 1


def summary_columns(rows: list[dict], more: Sequence[str] = ()) -> list[Column]:
    """Return the columns of a summary that decide, without those that say nothing about these rows; and more by name.

    Where no relative loss is known, the final losses take its place.
    """
    words = Words.of(rows[0])
    order = list(columns.PRINTED_LAYERS if has_several_layers(rows) else columns.PRINTED)
    if "relative_floor" in order and all(row.get("loss_floor_is_exact") is not False for row in rows):
        order.remove("relative_floor_upper")
    if all(str(row.get("status")) in (str(OK), "None") for row in rows):
        order.remove("status")
    if all(is_missing(row.get("relative_loss")) for row in rows):  # of another criterion, or of the scripts of 2025
        order[1:1] = ["final_val_loss", "final_train_loss"]
    if words.of_model:
        order = [columns.INCREASE_FOR.get(name, name) for name in order]
    return words.with_units(chosen(SUMMARY, dict.fromkeys([*order, *more])))


def summary_table(rows: list[dict], verbose: bool = False, explained: set[str] | None = None) -> str:
    """Return the summary as a printed table, a line for each rank; with the details in further tables if verbose.

    `explained` is as in `ks.files.table.table`.
    """
    shown = table(summary_columns(rows), rows, explained=explained)
    if not verbose:
        return shown
    metrics = [name for name in summary_metrics(rows) if name.startswith(FINAL)]
    details = [*chosen(SUMMARY, ("rank", *columns.DETAILS)), *columns.metric_columns(metrics)]
    return f"{shown}\n\n{table(details, rows)}"
