"""A metric by epoch, a line for each rank."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ks.report.figures import parts
from ks.report.figures.loss_curves import draw_ranks
from ks.report.sentences import of_metric
from ks.report.study import Study


def metric_by_epoch(
    study: Study, metric: str, *, log_scale: bool = False, title: str | None = None, figsize=None
) -> Figure:
    """Draw a metric against the epoch, with a line for each rank that has it.

    Args:
        study: whose curves hold the metric.
        metric: its name.
        log_scale: logarithmic axis, if all values are positive and span a decade.
        title: below the finding.
        figsize: (width, height) in inches.
    """
    figure = Figure(figsize=figsize or (8.5, 5), layout="constrained")
    axes = figure.subplots()
    values = study.curves[metric].dropna()
    ends = draw_ranks(axes, study.curves, metric, study.summary)
    parts.draw_grid(axes)
    if log_scale and values.max() >= 10 * values.min() > 0:  # an axis within a decade would have few ticks
        parts.set_log_axis(axes.yaxis, values.min(), values.max(), "{:g}".format)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    parts.finish_epoch_axis(axes)
    parts.label_ends(axes, ends, "rank")
    axes.set_ylabel(metric)
    parts.write_heading(figure, of_metric(metric, study.summary), title)
    return figure
