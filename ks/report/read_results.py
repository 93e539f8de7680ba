"""Reading a results folder, ours or one of the 2025 ksmm scripts, as a study to draw."""

from pathlib import Path

import pandas as pd

from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import read_json, read_json_object
from ks.files.curves import read_curves
from ks.files.layout import RunFiles, SweepFiles, find_runs
from ks.files.status import OK
from ks.report.study import Study, curves_table, summary_frame
from ks.report.summary import rank_row, run_row
from ks.training.losses import LossKind


def read_study(files: SweepFiles) -> Study:
    """Read a results folder, ours or one of the 2025 ksmm scripts; its summary says which ranks belong to the study.

    Raises:
        UsageError: no such folder, no results in it, or a file that cannot be read.
    """
    if not files.directory.is_dir():
        raise UsageError(f"{files.directory}: no such folder")
    config = read_json_object(files.config)
    first_seed = (config.get("seeds") or [None])[0]
    found = [run for run in find_runs(files.directory, first_seed) if run[2].curves_csv.is_file()]
    rows = read_json(files.summary_json)
    others = sorted(path.name.removesuffix("_summary.json") for path in files.directory.glob("*_summary.json"))
    if rows is None and others:
        raise UsageError(f"{files.directory} has no {files.summary_json.name}; give --save_prefix: {', '.join(others)}")
    if not found and not rows:
        raise UsageError(f"{files.directory} holds no results (no rank_R/rank_R_rank_R_loss_curves.csv in it)")
    if rows and all(isinstance(row, dict) and {"rank", "status"} <= row.keys() for row in rows):  # 2025: no status
        runs = _runs_of_study(files, found, rows, config.get("seeds") or [None])
    else:
        curves_of = [(rank, seed, read_curves(run.curves_csv)) for rank, seed, run in found]
        runs = [(run_row(rank, curves, OK, seed), curves) for rank, seed, curves in curves_of]
        rows = [
            rank_row([row for row, _ in runs if row["rank"] == rank]) for rank in dict.fromkeys(r for r, *_ in found)
        ]
    problem = config.get("problem", {})
    return Study(
        name=files.directory.name,
        curves=curves_table(runs),
        summary=summary_frame(rows),
        floor=_floor_table(files),
        title=config.get("title"),
        chain=problem.get("chain"),
        weight_sha256=problem.get("weight", {}).get("sha256"),
        loss_label=config.get("loss", LossKind.MEAN_SQUARED_ERROR.value),
    )


def _runs_of_study(
    files: SweepFiles, found: list[tuple[int, int | None, RunFiles]], rows: list[dict], seeds: list
) -> list[tuple[dict, list[dict]]]:
    """Return (row, curves) of the runs of a study; the status of each seed comes from the runs file."""
    ranks = {row["rank"]: row["status"] for row in rows}
    status_of: dict = {}
    if files.runs_csv.is_file():
        table = _read_table(files.runs_csv, ["rank", "seed", "status"])
        status_of = dict(zip(zip(table["rank"], table["seed"]), table["status"], strict=True))
    return [
        ({"rank": rank, "seed": seed, "status": status_of.get((rank, seed), ranks[rank])}, read_curves(run.curves_csv))
        for rank, seed, run in found
        if rank in ranks and seed in seeds
    ]


def _floor_table(files: SweepFiles) -> pd.DataFrame:
    names = columns.names(columns.FLOOR)
    return _read_table(files.floor_csv, names) if files.floor_csv.is_file() else pd.DataFrame(columns=names)


def _read_table(path: Path, needed: list[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    missing = [name for name in needed if name not in table]
    if missing:
        raise UsageError(f"{path} lacks the columns {', '.join(missing)}")
    return table
