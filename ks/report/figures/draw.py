"""All figures of a study: which it has the data for, their files, and windows for them."""

import io
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ks.errors import UsageError
from ks.files.atomic import atomic_path
from ks.files.layout import FIGURES, SweepFiles, metric_figure
from ks.model.model_plan import ModelPlan
from ks.report.comparison import comparable
from ks.report.figures import by_cost
from ks.report.figures.by_cost import loss_by_latency, loss_by_parameters
from ks.report.figures.by_epoch import gap_by_epoch, has_gaps, loss_curves, metric_by_epoch
from ks.report.figures.by_prediction import measured_by_predicted
from ks.report.figures.by_rank import final_losses, floor_by_rank, has_floors
from ks.report.figures.parts import Sheet
from ks.report.read_results import Study
from ks.report.summary import has_several_layers, measured_batches

UNHINTED: Any = {"text.hinting": "none"}  # as in SVG; fitting letters to pixels takes a fifth of the time
LEFT_OUT = r"<style[^>]*>.*?</style>|<!--.*?-->|<\?xml[^>]*>|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>"  # of an SVG
# By the name in the file name: what draws it, on an empty figure, and returns the finding for its heading; whether a
# study has the data for it.
DRAWN: dict[str, tuple[Callable[[Figure, Study, bool], str], Callable[[Study], bool]]] = {
    "loss_curves": (loss_curves, lambda study: len(study.curves) > 0),
    "final_losses": (final_losses, lambda study: True),
    "floor": (floor_by_rank, has_floors),
    "gap": (gap_by_epoch, has_gaps),
    "front": (loss_by_parameters, has_floors),
    "latency": (loss_by_latency, lambda study: bool(measured_batches(study.rows))),
}


def study_figures(
    study: Study,
    *,
    log_scale: bool = False,
    title: str | None = None,
    metrics: Iterable[str] = (),
    names: Collection[str] = FIGURES,
) -> dict[str, Sheet]:
    """Return the figures that a study has the data for, and one for each known metric, by the name in its file name.

    A study of several layers has none; those of each layer are in its folder.

    Args:
        study: to draw.
        log_scale: logarithmic loss axes.
        title: instead of the name of the study, below the finding of each figure.
        metrics: names of metrics; those without a value are left out.
        names: of the figures to draw.
    """
    if has_several_layers(study.rows):  # their losses share no axis
        return {}
    shown = study.config.title if title is None else title
    chosen = {name: draw for name, (draw, has_data) in DRAWN.items() if name in names and has_data(study)}
    known = [metric for metric in metrics if metric in study.metrics]
    chosen |= {metric_figure(metric): partial(metric_by_epoch, metric=metric) for metric in known}
    return {name: _figure(draw, study, log_scale, shown) for name, draw in chosen.items()}


def chains_figures(studies: Sequence[Study], *, log_scale: bool = False, title: str | None = None) -> dict[str, Sheet]:
    """Return a figure for each kind of studies whose losses compare, by the name in its file name."""
    title = title or "points: trained (number: rank); lines: floors"
    kinds = comparable(studies)
    names = {kind: "chains" if len(kinds) == 1 else "_".join(["chains", *kind]) for kind in kinds}
    return {names[kind]: _figure(by_cost.chains, found, log_scale, title) for kind, found in kinds.items()}


def plans_figures(plans: Sequence[ModelPlan], *, title: str | None = None) -> dict[str, Sheet]:
    """Return the figure of the predicted and measured increases of plans of one model, if there are any."""
    return {"plans": _figure(measured_by_predicted, plans, True, title or plans[0].checkpoint)} if plans else {}


@matplotlib.rc_context(UNHINTED)
def _figure(draw: Callable[..., str], drawn: Any, log_scale: bool, title: str | None) -> Sheet:
    figure = Sheet()
    figure.arrange(draw(figure, drawn, log_scale), title)
    return figure


@matplotlib.rc_context(UNHINTED)
def save_figures(figures: Mapping[str, Figure], files: SweepFiles, formats: Iterable[str], dpi: int) -> list[Path]:
    """Write figures atomically, each in every format, and return the paths."""
    paths = [(figure, files.figure(name, suffix)) for name, figure in figures.items() for suffix in formats]
    for figure, path in paths:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=dpi)
    return [path for _, path in paths]


def inline_svg(figure: Sheet, name: str) -> str:
    """Return the finding of a figure, and an <svg> for each of its panels and for the legend, which a page stacks.

    Labels are shapes, so that no font is needed; nothing is loaded.

    Args:
        figure: to draw; its finding is read aloud instead of it.
        name: unique in the page; all ids start with it.
    """
    buffer = io.StringIO()
    for text in figure.texts:  # the heading: its letters are a quarter of a page
        text.set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    for text in figure.texts:
        text.set_visible(True)
    svg = re.sub(LEFT_OUT, "", buffer.getvalue(), flags=re.DOTALL).strip()
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    finding, content = escape(figure.finding), svg.partition(">")[2].removesuffix("</svg>")
    shown = f"<p><b>{finding}</b></p>"
    for box in figure.parts():
        shown += f'<svg viewBox="{box}" role="img" aria-label="{finding}">{content}</svg>'
        content = f'<use href="#{name}-figure_1"/>'  # the same again, of which another part is seen
    return shown


def show(figures: Iterable[Figure]) -> None:
    """Open windows for the figures and wait until they are closed.

    Raises:
        UsageError: no display is available.
    """
    from matplotlib import pyplot

    if matplotlib.get_backend().lower() == "agg":
        raise UsageError("--show needs a display and a matplotlib GUI backend; the figures are saved without it")
    for figure in figures:
        manager = pyplot.figure().canvas.manager
        assert manager is not None
        manager.canvas.figure = figure
        figure.set_canvas(manager.canvas)
    pyplot.show()
