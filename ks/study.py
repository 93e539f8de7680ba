"""A results folder as tables: what the plots need, read from files alone, those of the 2025 scripts too."""

from dataclasses import dataclass

import pandas as pd

from ks import results, summary


@dataclass(frozen=True)
class Study:
    """One sweep.

    curves: one row per run and epoch (columns of the curves file, and seed). summary: one row per rank (columns of
    `ks.results.SUMMARY_COLUMNS`; of a 2025 folder only the losses are filled). floor: columns of
    `ks.results.FLOOR_COLUMNS`, empty where there is none. title: weight and chain, None where not known.
    """

    name: str
    curves: pd.DataFrame
    summary: pd.DataFrame
    floor: pd.DataFrame
    title: str | None
    chain: str | None
    weight_sha256: str | None


def read_study(files: results.SweepFiles) -> Study:
    """Read a results folder; a summary in it says what ranks belong to the study.

    Raises:
        ValueError: no such folder, no results in it, or a file that cannot be read.
    """
    if not files.directory.is_dir():
        raise ValueError(f"{files.directory}: no such folder")
    found = results.find_curves(files.directory)
    rows = results.read_json(files.summary_json)
    others = sorted(path.name.removesuffix("_summary.json") for path in files.directory.glob("*_summary.json"))
    if rows is None and others:
        raise ValueError(f"{files.directory} has no {files.summary_json.name}; give --save_prefix: {', '.join(others)}")
    if not found and not rows:
        raise ValueError(f"{files.directory} holds no results (no rank_R/rank_R_rank_R_loss_curves.csv in it)")
    config = results.read_json(files.config) or {}
    ours = bool(rows) and all("status" in row for row in rows)  # the 2025 summaries have no status
    if ours:
        found = {member: path for member, path in found.items() if member in _shown(files, rows, config)}
    curves = {member: results.read_curves(path) for member, path in found.items()}
    if not ours:
        runs = {rank: [] for rank, _ in found}
        for (rank, _), run in curves.items():
            runs[rank].append(summary.run_row(rank, run))
        rows = [summary.rank_row(of_rank) for of_rank in runs.values()]
    epochs = [epoch | {"seed": seed} for (_, seed), run in curves.items() for epoch in run]
    return Study(
        files.directory.name,
        pd.DataFrame(epochs),
        pd.DataFrame([{name: row.get(name) for name in results.SUMMARY_COLUMNS} for row in rows]),
        pd.read_csv(files.floor_csv) if files.floor_csv.is_file() else pd.DataFrame(columns=results.FLOOR_COLUMNS),
        config.get("title"),
        config.get("problem", {}).get("chain"),
        config.get("problem", {}).get("weight", {}).get("sha256"),
    )


def _shown(files: results.SweepFiles, rows: list[dict], config: dict) -> set[tuple[int, int | None]]:
    """The runs to draw: of this study, failed ones only where no seed of their rank finished."""
    first, *further = config.get("seeds") or [None]
    members = {(row["rank"], seed) for row in rows for seed in (None, *further)}
    if not files.runs_csv.is_file():
        return members
    runs = pd.read_csv(files.runs_csv)
    well = set(runs["rank"][runs["status"] == "ok"])
    failed = runs[(runs["status"] != "ok") & runs["rank"].isin(well)]
    return members - {(rank, None if seed == first else seed) for rank, seed in zip(failed["rank"], failed["seed"])}
