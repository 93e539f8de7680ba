"""The files of a concluded sweep: runs, curves, summary and figures, all from results in memory."""

import gc
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ks.bounds.rank_floors import RankFloors
from ks.cli.console import note
from ks.cli.flags import SweepConfig
from ks.files import columns
from ks.files.atomic import write_csv, write_json
from ks.files.curves import long_form
from ks.files.layout import FIGURES
from ks.files.status import ended_well
from ks.report.figures.draw import inline_svg, save_figures, study_figures
from ks.report.read_results import read_study
from ks.report.summary import Reference, rank_row, run_row, write_summary
from ks.report.weight_report import write_report
from ks.study.runs import Result
from ks.training.problem import Problem, relative_target


def summarise(
    config: SweepConfig, problem: Problem, plan: RankFloors, results: list[Result]
) -> tuple[list[dict], list[dict]]:
    """Return the rows of the runs, and the row of every rank.

    Floors, which are relative to the zero predictor, are left out if a finished run has no population loss, because the
    criterion is not the mean squared error.
    """
    identity = {
        "criterion": problem.edits.criterion,
        "weight": Path(config.weight_path).name,
        "weight_key": problem.weight.key,
        "weight_sha256": problem.weight.sha256(),
        "chain": problem.chain.describe(),
        "inputs": " ".join(problem.layer_inputs.description.get(name, "") for name in ("kind", "sha256")).strip(),
        "loss_metric": problem.loss_metric.value,
        "loss_unit": problem.unit,
    }
    held_out = problem.layer_inputs.held_out_predict_zero_loss
    count = problem.layer_inputs.description.get("held_out_count", 0)
    isotropic = None if plan.isotropic_curve is None else plan.isotropic_curve.tolist()
    target = relative_target(config, problem)
    reference = Reference(problem.predict_zero_loss, held_out, count, isotropic, target, identity)
    runs = [run_row(result.run.rank, result.curves, result.ending, result.run.seed, result.log) for result in results]
    measured = all(row["population_loss"] is not None for row in runs if ended_well(row["status"]))
    rows = [
        rank_row([row for row in runs if row["rank"] == rank], problem.chain, floor if measured else None, reference)
        for rank, floor in plan.floors(sorted({row["rank"] for row in runs})).items()
    ]
    if not problem.edits.criterion_is_ours:  # whose losses have another unit
        for row in rows:
            row["predict_zero_loss"] = None
    return runs, rows


def write_outputs(
    config: SweepConfig, record: dict, results: list[Result], runs: list[dict], rows: list[dict]
) -> list[Path]:
    """Write the tables of a sweep and, from the files alone as a later plot would, its figures and its report.

    Args:
        config: of the sweep; the table of the floors is in its folder.
        record: content of the sweep's config file, with the answer.
        runs, rows: as `summarise` returns them.
    Returns:
        the paths of the summary, the figures and the report.
    """
    files = config.files()
    gc.freeze()  # a full collection would search all that torch and pandas have loaded
    write_json(files.config, record)
    write_csv(files.runs_csv, [*columns.names(columns.RUNS), *columns.summary_metrics(runs)], runs)
    curves = [row for result in results for row in long_form(result.run.rank, result.run.seed, result.curves)]
    metrics = columns.metric_names(curves, columns.ALL_CURVES)
    write_csv(files.all_curves_csv, [*columns.names(columns.ALL_CURVES), *metrics], curves)
    write_summary(files, rows)
    study = read_study(files)
    look: dict[str, Any] = {"log_scale": config.log_scale, "title": config.title}
    drawn = study_figures(study, metrics=config.metric, **look)
    written = save_figures(drawn, files, config.formats, config.dpi)
    write_report(study, files, drawn, log_scale=config.log_scale)
    if unknown := study.unknown_metrics(config.metric):
        note(f"WARNING: {unknown}")
    return [files.summary_csv, *written, files.report]


def rehearse(config: SweepConfig, rows: list[dict]) -> Iterator[None]:
    """Draw the figures of some ranks in short steps and keep none: those of all ranks then find fonts and code ready.

    Args:
        rows: of the ranks that have finished, as `summarise` returns them.
    """
    study = read_study(config.files(), rows)
    for name in FIGURES:
        for figure in study_figures(study, names=[name], log_scale=config.log_scale).values():
            yield
            figure.savefig(io.BytesIO(), format=config.formats[0], dpi=config.dpi)
            yield
            inline_svg(figure, name)
            yield
