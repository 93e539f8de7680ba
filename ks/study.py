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


def read_study(files: results.SweepFiles) -> Study:
    """Read a results folder; a summary in it says what ranks belong to the study.

    Raises:
        ValueError: no such folder, no results in it, or a file that cannot be read.
    """
    if not files.directory.is_dir():
        raise ValueError(f"{files.directory}: no such folder")
    found = results.find_curves(files.directory)
    rows = results.read_json(files.summary_json)
    if not found and not rows:
        raise ValueError(f"{files.directory} holds no results (no rank_R/rank_R_rank_R_loss_curves.csv in it)")
    config = results.read_json(files.config) or {}
    if rows:
        seeds = [None, *config.get("seeds", [])[1:]]
        members = [(row["rank"], seed) for row in rows for seed in seeds]
        found = {member: found[member] for member in members if member in found}
    curves = {member: results.read_curves(path) for member, path in found.items()}
    if not rows:
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
    )
