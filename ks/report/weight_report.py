"""The report of a study of one weight, with its figures inside; the command that reproduces a study."""

import dataclasses
import shlex
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd

from ks.cli.flags import SweepConfig
from ks.cli.parser import path, to_arguments
from ks.files import columns
from ks.files.columns import LATENCIES, SUMMARY
from ks.files.layout import SweepFiles, metric_figure
from ks.files.schema import StudyRecord
from ks.files.table import is_missing
from ks.report import page
from ks.report.figures.draw import inline_svg, study_figures
from ks.report.figures.parts import Sheet
from ks.report.read_results import MEAN_SQUARED_ERROR, Study
from ks.report.sentences import recommendation
from ks.report.summary import summary_columns

ON_BOTH_AXES = ("loss_curves", "final_losses")
AFFECTED = (*ON_BOTH_AXES, "floor", "front", "latency")  # by log_scale
SQUASHED = 10  # losses that differ by this factor, or are so far below the zero predictor, need a logarithmic axis too
CAPTIONS = {
    "loss_curves": "Loss by epoch. Where a rank has a floor, it is dashed: no chain of the rank gets below it.",
    "final_losses": "Final loss of every rank, beside its floor if it has one.",
    "floor": "The loss that each rank could reach at best, and the loss that its run reached.",
    "gap": "The loss that more epochs could still save.",
    "front": "Loss against size: the family that loses least with so many parameters.",
    "latency": "Loss against the measured time of a forward pass; right of the line, dense is faster.",
    "metric": "A metric by epoch, on the validation samples.",
    "plans": "Measured against predicted increases of the loss of the model, of plans and of equal fractions.",
}
GLOSSARY = {
    "rank": "inner dimension of the blocks of the chain; a larger rank has more parameters and never a worse optimum",
    "chain": "a product of sparse factors that takes the place of the dense weight",
    "saturated": "a rank so large that a larger one changes nothing",
    "held out": "inputs that were measured and kept back from the runs",
    "zero predictor": "outputs that are all 0",
    "floor": "the least loss that any chain of the rank can have; where two bounds stand, it lies between them",
    "best known chain": "the chain whose loss is the upper bound of the floor; a run may beat it",
    "optimality gap": "how far the loss is above that of the best known chain, as a fraction of it",
    "front": "the least loss with at most so many parameters, over all families",
    "relative loss": "E‖Wx − Ŵx‖² / E‖Wx‖², the fraction of the output energy that is lost: 0% is dense, 100% is the "
    "zero predictor, whose loss is the energy of the dense outputs",
    "loss increase": "½ tr(G (W − Ŵ) C (W − Ŵ)ᵀ), with C = E[x xᵀ] of the inputs and G = E[g gᵀ] of the gradients of "
    "the loss of the model at the outputs of the layer: the increase of the loss{unit}, that is predicted to "
    "second order, with x and g taken as independent. The prediction ranks chains; the increase that was measured on a "
    "language model is about twice as large, and ks.measure_loss measures yours",
    "energy loss": "E‖Wx − Ŵx‖² / E‖Wx‖², the fraction of the output energy that is lost; a chain that loses less of "
    "it may cost the model more",
}
OF_LOSSES = ("zero predictor", "floor", "best known chain", "optimality gap", "front")  # terms of the glossary
FRACTIONS_OF_ENERGY = (0.5, 0.9, 0.99)


def write_report(study: Study, files: SweepFiles, drawn: dict[str, Sheet], *, log_scale: bool = False) -> None:
    """Write the report of a study, with its figures and those of all its metrics.

    Where a linear axis squashes the losses, the curves and the final losses are there on both kinds of axes, and the
    other figures on logarithmic ones.

    Args:
        study: read from its files.
        files: of the study.
        drawn: its figures, by name; those of metrics that are missing are drawn here.
        log_scale: whether they have logarithmic loss axes.
    """
    metrics = [name for name in study.metrics if metric_figure(name) not in drawn]
    shown = drawn | study_figures(study, metrics=metrics, log_scale=log_scale, names=())
    squashed = not log_scale and is_squashed(study)
    logarithmic = study_figures(study, log_scale=True, names=AFFECTED) if squashed else {}
    figures = []
    for name, figure in shown.items():
        caption, other = CAPTIONS.get(name, CAPTIONS["metric"]), logarithmic.get(name, figure)
        if name in logarithmic and name in ON_BOTH_AXES:
            figures.append((inline_svg(figure, f"{name}_linear"), f"{caption} Linear axis."))
            caption += " Logarithmic axis."
        figures.append((inline_svg(other, name), caption))
    name = study.config.title or study.name
    page.write_page(files.report, name, recommendation(study) or [name], _sections(study, figures))


def is_squashed(study: Study) -> bool:
    """Return whether losses, with the zero predictor, are too far apart for a linear axis."""
    losses = study.losses["best"].dropna()
    return len(losses) > 0 and np.nanmax([losses.max(), study.units.zero]) > SQUASHED * losses.min()


def _sections(study: Study, drawn: list[tuple[str, str]]) -> list[tuple[str, str]]:
    config, rows = study.config, study.rows
    metrics = [f"{columns.FINAL}{metric}" for metric in study.metrics]
    shown = [*summary_columns(rows, ("held_out_loss_increase", "parameters")), *columns.metric_columns(metrics)]
    timed = [row for row in rows if any(not is_missing(row.get(column.name)) for column in LATENCIES)]
    return [
        ("Ranks", page.table(shown, rows, study.words.axis_unit)),
        ("Figures", page.figures(drawn)),
        ("Remarks", page.items(config.advice)),
        ("Latency: median milliseconds of a forward pass", page.table([SUMMARY[0], *LATENCIES], timed)),
        ("Weight", page.definitions(_weight(study))),
        ("Inputs", page.definitions(_inputs(config))),
        ("Glossary", page.definitions(_glossary(study))),
        *ending(config),
    ]


def ending(config: StudyRecord) -> list[tuple[str, str]]:
    """Return the sections at the end of the page of a study: the command that reproduces it, and where it ran."""
    command = page.commands([reproducing_command(config)] if config.arguments else [])
    return [("Command that reproduces this study", command), ("Provenance", page.definitions(_provenance(config)))]


def _glossary(study: Study) -> dict[str, str]:
    """Return the terms that the page uses."""
    terms = ["rank", "chain", "saturated", "held out"]
    if study.loss_label == MEAN_SQUARED_ERROR:
        terms += OF_LOSSES if study.words.of_model else [*OF_LOSSES, "relative loss"]
    if study.summary["loss_increase"].notna().any():
        terms += ["loss increase", "energy loss"]
    return {term: GLOSSARY[term].format(unit=study.words.in_unit) for term in terms}


def _weight(study: Study) -> dict[str, str | None]:
    config, weight, criterion = study.config, study.config.problem.weight, study.config.settings.get("criterion")
    if study.loss_label == MEAN_SQUARED_ERROR:
        criterion = None
    return {
        "file": file_name(config, "weight_path"),
        "key": weight.key,
        "shape (out × in)": weight.shape
        and f"{weight.shape[0]} × {weight.shape[1]}, {weight.shape[0] * weight.shape[1]:,} parameters",
        "dtype": weight.dtype,
        "chain": config.problem.chain,
        "criterion": criterion
        and f"{criterion}; losses are those of outputs in units of the root mean square of W x, and no floor holds",
        "spectrum": _spectrum(study),
        "sha256": weight.sha256,
    }


def file_name(config: StudyRecord, flag: str) -> str | None:
    """Return the name of the file of a flag, without its folder."""
    given = config.arguments.get(flag)
    return PurePath(given).name if isinstance(given, str) else None


def _spectrum(study: Study) -> str | None:
    """Return how many directions carry most of the output energy, from the floors of low-rank chains."""
    lost = study.floor[study.floor["chain"] == "lowrank"].set_index("rank")["relative_loss"]
    if lost.empty:
        return None
    ranks = [lost.index[lost <= 1 - fraction + 1e-12].min() for fraction in FRACTIONS_OF_ENERGY]
    if any(map(pd.isna, ranks)):
        return None
    fractions = " / ".join(f"{fraction:.0%}" for fraction in FRACTIONS_OF_ENERGY)
    return (
        f"{fractions} of the {study.words.zero_loss} in the first {' / '.join(map(str, ranks))} of {lost.index.max()} "
        "directions"
    )


def _inputs(config: StudyRecord) -> dict[str, str | None]:
    inputs = config.problem.inputs
    if inputs.kind is None:
        return {}
    if inputs.kind == columns.ISOTROPIC:
        std = f", standard deviation {inputs.std:g}" if inputs.std is not None else ""
        return {"kind": f"isotropic{std}; the inputs of a real layer differ"}
    return {
        "kind": f"measured{', around their mean' if inputs.centred else ''}",
        "file": file_name(config, "inputs"),
        "key": inputs.key,
        "samples": f"{inputs.count or 0:,}, and {inputs.held_out_count or 0:,} held out",
        "effective rank": f"{inputs.effective_rank:.1f}" if inputs.effective_rank is not None else None,
        "sha256": inputs.sha256,
        "gradients": inputs.gradients_sha256
        and f"sha256 {inputs.gradients_sha256}; G is damped by {inputs.damping:g} of its mean diagonal",
    }


def _provenance(config: StudyRecord) -> dict[str, str | None]:
    known = {name: str(value) for name, value in config.provenance.items() if isinstance(value, (str, int, float))}
    cores = f"{known['cpu']}, {known['cpu_cores']} cores" if {"cpu", "cpu_cores"} <= known.keys() else known.get("cpu")
    hardware = [known["gpu"], f"CUDA {known.get('cuda')}"] if "gpu" in known else [cores]
    return {
        "started": known.get("started"),
        "device": ", ".join(filter(None, hardware)),
        "platform": known.get("platform"),
        "versions": ", ".join(f"{name} {known[name]}" for name in ("python", "torch") if name in known),
        "git revision": known.get("git_revision"),
    }


def reproducing_command(record: StudyRecord) -> str:
    """Return the command of a sweep with the flags that are not at their defaults; of files, the names alone.

    Its ranks and seeds may have come from several commands.
    """
    arguments = record.arguments | {"ranks": record.ranks or None, "max_rank": None, "overwrite": False}
    if record.seeds != [arguments.get("seed", 0)]:
        arguments["seeds"] = record.seeds
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(SweepConfig):
        value: Any = arguments.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if value != field.default:
            is_path = field.metadata["flag"].convert is path and isinstance(value, str)
            settings[field.name] = Path(value).name if is_path else value
    first = {name: settings[name] for name in ("weight_path", "weight_key", "inputs") if name in settings}
    return "python rank_sweep_study.py " + shlex.join(to_arguments(first | settings))
