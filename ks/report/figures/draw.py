"""All figures of a study: which it has the data for, their files, and windows for them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ks.errors import UsageError
from ks.files.atomic import atomic_path
from ks.files.layout import SweepFiles, metric_figure
from ks.report.figures.final_losses import final_losses
from ks.report.figures.floor import floor_by_rank, has_floors
from ks.report.figures.front import loss_by_parameters
from ks.report.figures.gap import gap_by_epoch, has_gaps
from ks.report.figures.latency import loss_by_latency
from ks.report.figures.loss_curves import loss_curves
from ks.report.figures.metric import metric_by_epoch
from ks.report.speed import measured_batches
from ks.report.study import Study

# By the name in the file name: what draws it, and whether a study has the data for it.
DRAWN: dict[str, tuple[Callable[..., Figure], Callable[[Study], bool]]] = {
    "loss_curves": (loss_curves, lambda study: len(study.curves) > 0),
    "final_losses": (final_losses, lambda study: True),
    "floor": (floor_by_rank, has_floors),
    "gap": (gap_by_epoch, has_gaps),
    "front": (loss_by_parameters, has_floors),
    "latency": (loss_by_latency, lambda study: bool(measured_batches(study.summary.to_dict("records")))),
}


def study_figures(
    study: Study, *, log_scale: bool = False, title: str | None = None, figsize=None, metrics: Iterable[str] = ()
) -> dict[str, Figure]:
    """Return every figure that a study has the data for, and one for each known metric, by the name in its file name.

    Args:
        study: to draw.
        log_scale: logarithmic loss axes.
        title: instead of the name of the study, below the finding of each figure.
        figsize: (width, height) in inches.
        metrics: names of metrics; those without a value are left out.
    """
    look: dict[str, Any] = {"log_scale": log_scale, "title": study.title if title is None else title}
    look["figsize"] = figsize
    drawn = {name: draw(study, **look) for name, (draw, has_data) in DRAWN.items() if has_data(study)}
    known = [name for name in metrics if name in study.metrics]
    return drawn | {metric_figure(name): metric_by_epoch(study, name, **look) for name in known}


def save_figures(figures: dict[str, Figure], files: SweepFiles, formats, dpi: int) -> list[Path]:
    """Write figures atomically, each in every format.

    Returns:
        the paths written.
    """
    paths = [(figure, files.figure(name, suffix)) for name, figure in figures.items() for suffix in formats]
    for figure, path in paths:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=dpi)
    return [path for _, path in paths]


def show(figures: list[Figure]) -> None:
    """Open windows for the figures and wait until they are closed.

    Raises:
        UsageError: no display is available.
    """
    import matplotlib
    from matplotlib import pyplot

    if matplotlib.get_backend().lower() == "agg":
        raise UsageError("--show needs a display and a matplotlib GUI backend; the figures are saved without it")
    for figure in figures:
        manager = pyplot.figure().canvas.manager
        assert manager is not None
        manager.canvas.figure = figure
        figure.set_canvas(manager.canvas)
    pyplot.show()
