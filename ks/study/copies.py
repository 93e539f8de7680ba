"""Ranks above saturation: one of them is trained, and the others get a copy of its results in their own names."""

import shutil
from collections.abc import Iterable

from ks.files.atomic import atomic_path, prepare_output_dir, read_json_object, write_json
from ks.files.curves import read_curves, write_curves
from ks.files.layout import RunFiles
from ks.study.run import Result, Run


def copies_of(runs: Iterable[Run], saturation: int, found: dict[Run, Result]) -> dict[Run, Run]:
    """Return the runs that are copies, each with the run that it copies.

    Of the runs of one seed at or above saturation, one is trained: one that was trained before, else the smallest rank.

    Args:
        runs: of a study.
        saturation: rank above which a larger rank changes nothing.
        found: what earlier sweeps left of each run.
    """

    def order(run: Run) -> tuple:
        result = found[run]
        return result.copy_of is not None, -len(result.curves), run.rank

    sources: dict[int, Run] = {}
    saturated = sorted((run for run in runs if run.rank >= saturation), key=order)
    return {run: sources[run.seed] for run in saturated if sources.setdefault(run.seed, run) is not run}


def copy_results(source: RunFiles, target: RunFiles) -> None:
    """Copy the results of a finished training into the folder of another rank, under its names; the log comes last."""
    prepare_output_dir(target.directory)
    names = dict(zip((path.name for path in source.results()), (path.name for path in target.results()), strict=True))
    config = read_json_object(source.config)
    rank = {"rank": target.rank}
    config |= {key: config.get(key, {}) | rank for key in ("settings", "arguments")}
    config |= {"copy_of": source.rank, "files": sorted(names.values())}
    write_json(target.config, config)
    write_curves(target, [row | rank for row in read_curves(source.curves_csv, source.rank)])
    for kept, copy in ((source.final, target.final), (source.best, target.best)):
        with atomic_path(copy) as temporary:
            shutil.copyfile(kept, temporary)
    with atomic_path(target.log) as temporary:
        temporary.write_text(f"copied from {source.directory}: from that rank on, more rank changes nothing\n")
    write_json(target.training_log, read_json_object(source.training_log) | {"copy_of": source.rank})
