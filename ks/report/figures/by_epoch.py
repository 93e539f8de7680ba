"""Figures with the epoch on the x axis: training and validation loss, the distance to the floor, a metric."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ks.report.figures import parts
from ks.report.figures.parts import GREY, rank_colors
from ks.report.read_results import Study
from ks.report.sentences import of_gaps, of_losses, of_metric
from ks.report.verdict import SMALL_EXCESS

FLOOR_LINE: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.0}
LEAST = 1e-6  # a gap this small, as a fraction of the zero predictor's loss, is drawn at the foot of a logarithmic axis


def _draw_ranks(axes: Axes, curves: pd.DataFrame, column: str, summary: pd.DataFrame, **look) -> list[tuple]:
    """Draw a column of the curves by epoch, a line for each rank with a value; return what `parts.label_ends` writes.

    A rank with several seeds has a band of one standard error to each side of its mean. The line of a rank that did
    not finish is dotted and marked.
    """
    colors, failed = rank_colors(summary["rank"]), set(summary["rank"][summary["num_seeds"] == 0])
    ends = []
    for rank, run in curves.groupby("rank"):
        band = run[np.isfinite(run[column])].groupby("epoch")[column].agg(["mean", "sem"])
        if band.empty:
            continue
        line: dict[str, Any] = {"color": colors[rank], "linewidth": 1.8, "marker": "o" if len(band) == 1 else None}
        axes.plot(band.index, band["mean"], ":" if rank in failed else "-", **line | look)
        spread = band["sem"].fillna(0.0)
        if spread.any():
            limits = (band["mean"] - spread, band["mean"] + spread)
            axes.fill_between(band.index, *limits, color=colors[rank], alpha=0.25, linewidth=0)
        label = f"{rank} (failed)" if rank in failed else f"{rank}"
        ends.append((band.index[-1], band["mean"].iloc[-1], label, colors[rank]))
    axes.set_xlabel("epoch")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return ends


def loss_curves(figure: Figure, study: Study, log_scale: bool) -> str:
    """Draw training and validation loss on one scale, a line for each rank, its floor dashed.

    Where the floor of a rank is bracketed, both bounds are dashed, with a band between them. No floor holds for inputs
    that are held out.
    """
    panels = parts.make_panels(figure, 2)
    units, losses, colors = study.units, study.losses, rank_colors(study.summary["rank"])
    curves = study.curves.assign(
        train_loss=study.curves["train_loss"] / units.train, val_loss=study.curves["val_loss"] / units.validation
    )
    floored = losses[losses["lower"].notna()]
    values, floors = curves[["train_loss", "val_loss"]].to_numpy().ravel(), floored[["lower", "upper"]].to_numpy()
    held_out = study.config.problem.held_out_predict_zero_loss
    names = ("Training", "Held-out inputs" if held_out else "Validation")
    zeros = (units.zero, held_out if held_out and units.words.of_model else units.zero)  # fractions are of their own
    for axes, column, name, zero in zip(panels, ("train_loss", "val_loss"), names, zeros):
        ends = _draw_ranks(axes, curves, column, study.summary)
        axes.set_title(name, fontsize="medium", y=1.0)
        own = dataclasses.replace(units, zero=zero)
        parts.finish_loss_axis(axes, own, [*values, *zeros], floors.ravel(), log_scale=log_scale)
        parts.label_ends(axes, ends)
        axes.tick_params(labelleft=True)
    low = panels[0].get_ylim()[0] if log_scale else -1.0
    for axes in panels[:1] if held_out else panels:
        for row in floored.itertuples():
            for floor in {row.lower, row.upper}:
                if floor > low:
                    axes.axhline(floor, color=colors[row.rank], **FLOOR_LINE)
            if row.bracketed:
                axes.axhspan(max(row.lower, low), max(row.upper, low), color=colors[row.rank], alpha=0.1, linewidth=0)
    if len(floored):
        hidden = [str(row.rank) for row in floored.itertuples() if row.upper < low]
        label = "floor of each rank" + (": both bounds" if floored["bracketed"].any() else "")
        label += f" (below the axis: rank {', '.join(hidden)})" if hidden else ""
        parts.write_legend(figure, [Line2D([], [], color=GREY, label=label, **FLOOR_LINE)])
    return of_losses(study)


def has_gaps(study: Study) -> bool:
    """Return whether a rank has both a floor and population losses by epoch."""
    known = {"population_loss", "rank"} <= {*study.curves.columns} and study.units.relative
    floored = study.summary["rank"][study.summary["loss_floor_upper"].notna()]
    return known and bool(study.curves["population_loss"][study.curves["rank"].isin(floored)].notna().any())


def gap_by_epoch(figure: Figure, study: Study, log_scale: bool) -> str:
    """Draw how far the population loss of each rank is above its floor, or above the best known chain.

    Distances shrink by decades, so the axis is logarithmic whatever `log_scale` is.
    """
    del log_scale
    (axes,) = parts.make_panels(figure)
    units, losses, zero = study.units, study.losses, study.units.zero
    floors = study.curves["rank"].map(losses.set_index("rank")["upper"])
    gaps = study.curves.assign(gap=(study.curves["population_loss"] / units.train - floors).clip(lower=LEAST * zero))
    ends = _draw_ranks(axes, gaps, "gap", study.summary, marker="o", markersize=4, linewidth=1.6)
    parts.finish_loss_axis(axes, units, [*gaps["gap"], SMALL_EXCESS / 5 * zero], log_scale=True)
    axes.axhspan(axes.get_ylim()[0], SMALL_EXCESS * zero, color=GREY, alpha=0.12, linewidth=0, zorder=0)
    axes.annotate(f"shaded: {units.words.small}", (0.01, 0.02), xycoords="axes fraction", **parts.NOTE)
    parts.label_ends(axes, ends)
    goal = "the best known chain" if losses["bracketed"].any() else "the floor"
    axes.set_ylabel(f"{units.label}, above\n{goal} of the rank")
    return of_gaps(study)


def metric_by_epoch(figure: Figure, study: Study, log_scale: bool, metric: str) -> str:
    """Draw a metric, a line for each rank; on a logarithmic axis only if all values are positive and span a decade."""
    (axes,) = parts.make_panels(figure)
    values = study.curves[metric].dropna()
    ends = _draw_ranks(axes, study.curves, metric, study.summary)
    parts.draw_grid(axes)
    if log_scale and values.max() >= 10 * values.min() > 0:  # an axis within a decade would have few ticks
        parts.set_log_axis(axes.yaxis, values.min(), values.max(), "{:g}".format)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    parts.label_ends(axes, ends)
    axes.set_ylabel(metric)
    return of_metric(metric, study.summary)
