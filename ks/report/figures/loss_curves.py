"""Loss by epoch: training and validation, a line for each rank, its floor dashed."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ks.report.figures import parts
from ks.report.figures.colors import GREY, rank_colors
from ks.report.sentences import of_losses
from ks.report.study import Study
from ks.report.units import losses_of, units_of

FLOOR_LINE: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.0}


def draw_ranks(axes: Axes, curves: pd.DataFrame, column: str, summary: pd.DataFrame) -> list[tuple]:
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
        look: dict[str, Any] = {"color": colors[rank], "linewidth": 1.8, "marker": "o" if len(band) == 1 else None}
        axes.plot(band.index, band["mean"], ":" if rank in failed else "-", **look)
        spread = band["sem"].fillna(0.0)
        if spread.any():
            limits = (band["mean"] - spread, band["mean"] + spread)
            axes.fill_between(band.index, *limits, color=colors[rank], alpha=0.25, linewidth=0)
        label = f"{rank} (failed)" if rank in failed else f"{rank}"
        ends.append((band.index[-1], band["mean"].iloc[-1], label, colors[rank]))
    return ends


def loss_curves(study: Study, *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Draw training and validation loss against the epoch, on one scale, with a line for each rank.

    The floor of a rank is dashed in its colour; where it is bracketed, both bounds are, with a band between them.

    Args:
        study: with curves.
        log_scale: logarithmic loss axis.
        title: below the finding.
        figsize: (width, height) in inches; a narrow figure has the panels one above the other, and
            becomes as high as they need.
    """
    figure = Figure(figsize=figsize or (12, 5), layout="constrained")
    panels = parts.make_panels(figure, 2)
    units, summary = units_of(study), study.summary
    losses, colors = losses_of(study, units), rank_colors(summary["rank"])
    curves = study.curves.assign(
        train_loss=study.curves["train_loss"] / units.train, val_loss=study.curves["val_loss"] / units.validation
    )
    ends: dict[Axes, list] = {}
    held_out = study.held_out_predict_zero_loss is not None
    names = ("Training", "Held-out inputs" if held_out else "Validation")
    for axes, column, name in zip(panels, ("train_loss", "val_loss"), names):
        ends[axes] = draw_ranks(axes, curves, column, summary)
        axes.set_title(name, fontsize="medium")
        parts.finish_epoch_axis(axes)
    floored = losses[losses["lower"].notna()]
    drawn = panels[:1] if held_out else panels  # no floor holds for the inputs that are held out
    for axes in panels:
        values = curves[["train_loss", "val_loss"]].to_numpy().ravel()
        floors = floored[["lower", "upper"]].to_numpy().ravel()
        parts.finish_loss_axis(axes, units, values, floors, log_scale=log_scale)
    low = panels[0].get_ylim()[0] if log_scale else -1.0
    for axes in drawn:
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
        line = Line2D([], [], color=GREY, label=label, **FLOOR_LINE)
        parts.write_legend(figure, [line])
    for axes in panels:
        parts.label_ends(axes, ends[axes], "rank")
        axes.set_ylabel(parts.literal(units.label))
        axes.tick_params(labelleft=True)
        if units.relative:
            parts.note_references(axes, log_scale=log_scale)
    parts.write_heading(figure, of_losses(losses, summary, units), title)
    return figure
