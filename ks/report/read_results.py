"""Reading a results folder, ours or one of the 2025 ksmm scripts, as a study to draw."""

from typing import Annotated

import msgspec
import pandas as pd

from ks.errors import UsageError
from ks.files import columns
from ks.files.curves import read_curves
from ks.files.layout import RunFiles, SweepFiles, find_runs
from ks.files.schema import StudyRecord, convert, read_json_as, read_summary, read_table
from ks.files.status import OK
from ks.report.study import Study, curves_table, loss_label, summary_frame
from ks.report.summary import rank_row, run_row


class Target(msgspec.Struct):
    """The flag of a sweep that its figures show."""

    target_relative_loss: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None


def read_study(files: SweepFiles) -> Study:
    """Read a results folder, ours or one of the 2025 ksmm scripts; its summary says which ranks belong to the study.

    Raises:
        UsageError: no such folder, no results in it, or a file that cannot be read.
    """
    if not files.directory.is_dir():
        raise UsageError(f"{files.directory}: no such folder")
    config = read_json_as(files.config, StudyRecord) if files.config.exists() else None
    first_seed = config.seeds[0] if config else None
    found = [run for run in find_runs(files.directory, first_seed) if run[2].curves_csv.is_file()]
    rows = _summary_rows(files)
    if not found and not rows:
        raise UsageError(f"{files.directory} holds no results (no rank_R/rank_R_rank_R_loss_curves.csv in it)")
    if config is not None and rows:
        runs = _runs_of_study(files, found, rows, config.seeds)
    else:  # of the 2025 scripts, whose summary has no more than the curves
        curves_of = [(rank, seed, read_curves(run.curves_csv, rank)) for rank, seed, run in found]
        runs = [(run_row(rank, curves, OK, seed), curves) for rank, seed, curves in curves_of]
        ranks = dict.fromkeys(rank for rank, *_ in found)
        rows = [rank_row([row for row, _ in runs if row["rank"] == rank]) for rank in ranks]
    return Study(
        name=files.directory.name,
        curves=curves_table(runs),
        summary=summary_frame(rows),
        floor=_floor_table(files),
        title=config.title if config else None,
        chain=config.problem.chain if config else None,
        weight_sha256=config.problem.weight.sha256 if config else None,
        loss_label=loss_label(config),
        answer=tuple(config.answer) if config else (),
        predict_zero_loss=config.problem.predict_zero_loss if config else None,
        held_out_predict_zero_loss=config.problem.held_out_predict_zero_loss if config else None,
        target=convert(config.arguments, Target, str(files.config)).target_relative_loss if config else None,
        config=config,
    )


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


def _runs_of_study(
    files: SweepFiles, found: list[tuple[int, int | None, RunFiles]], rows: list[dict], seeds: list
) -> list[tuple[dict, list[dict]]]:
    """Return (row, curves) of the runs of a study; the status of each seed comes from the runs file."""
    ranks = {row["rank"]: row["status"] for row in rows}
    status_of: dict = {}
    if files.runs_csv.is_file():
        read = ("rank", "seed", "status")
        known = read_table(files.runs_csv, [column for column in columns.RUNS if column.name in read], read)
        status_of = {(row["rank"], row["seed"]): row["status"] for row in known}
    return [
        (
            {"rank": rank, "seed": seed, "status": status_of.get((rank, seed), ranks[rank])},
            read_curves(run.curves_csv, rank),
        )
        for rank, seed, run in found
        if rank in ranks and seed in seeds
    ]


def _floor_table(files: SweepFiles) -> pd.DataFrame:
    declared = columns.names(columns.FLOOR)
    rows = read_table(files.floor_csv, columns.FLOOR, declared) if files.floor_csv.is_file() else []
    return pd.DataFrame(rows, columns=declared)
