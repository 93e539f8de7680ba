"""Final losses of all ranks beside each other: training, validation, and the floor."""

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ks.report.figures import parts
from ks.report.figures.colors import GREY, ink, paper, rank_colors
from ks.report.sentences import of_range
from ks.report.study import Study
from ks.report.units import losses_of, units_of

ASIDE = 0.2  # of the distance of two ranks: training to the left, validation to the right


def final_losses(study: Study, *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Draw the final training and validation loss of every rank, with a tick at its floor or a bracket of its bounds.

    On a linear axis they are bars from 0; a logarithmic axis has no such foot and shows points. For a rank
    without a loss, its status is written there. Whiskers are standard errors over seeds.

    Args:
        study: with a summary.
        log_scale: logarithmic loss axis.
        title: below the finding.
        figsize: (width, height) in inches.
    """
    units = units_of(study)
    losses, colors = losses_of(study, units), rank_colors(study.summary["rank"])
    figure = Figure(figsize=figsize or (max(6.5, 2.8 + 0.75 * len(losses)), 4.8), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(losses))
    fills = [colors[rank] for rank in losses["rank"]]
    values = losses[["train", "validation", "exact"]].to_numpy(float)
    parts.finish_loss_axis(
        axes, units, values.ravel(), losses[["lower", "upper"]].to_numpy().ravel(), log_scale=log_scale
    )
    for name, shift in (("train", -ASIDE), ("validation", ASIDE)):
        whole = name == "validation"
        errors = losses[f"{name}_se"].to_numpy(float)
        whiskers: dict[str, Any] = {"ecolor": GREY, "capsize": 3, "linestyle": "", "zorder": 4}
        if np.isfinite(errors).any():
            axes.errorbar(positions + shift, losses[name], yerr=errors, **whiskers)
        if log_scale:
            inside = fills if whole else paper()
            axes.scatter(positions + shift, losses[name], 55, color=inside, edgecolors=fills, linewidths=1.8, zorder=3)
        else:
            axes.bar(positions + shift, losses[name], 2 * ASIDE - 0.02, color=fills, alpha=1.0 if whole else 0.45)
    ends: dict[str, Any] = {"colors": ink(), "linewidth": 1.8, "zorder": 5}
    for bound in ("lower", "upper"):
        axes.hlines(losses[bound], positions - 0.42, positions + 0.42, **ends)
    between = losses["bracketed"].to_numpy()
    axes.vlines(positions[between], losses["lower"][between], losses["upper"][between], **ends)
    close = figure.get_figwidth() < 0.62 * (len(losses) + 1.5)
    for position, row in enumerate(losses.itertuples()):
        top = np.nanmax([row.train, row.validation, row.upper, 0.0])
        if np.isfinite(row.best) and top > 0:
            place: dict[str, Any] = {"textcoords": "offset points", "fontsize": "small", "ha": "center"}
            text = units.show(row.best)
            axes.annotate(text, (position, top), (0, 5), rotation=90 if close else 0, va="bottom", zorder=6, **place)
        elif not np.isfinite(row.best):
            place = {"xycoords": ("data", "axes fraction"), "fontsize": "small", "ha": "center", "va": "bottom"}
            axes.annotate(parts.literal(row.status), (position, 0.06), rotation=90, color="firebrick", **place)
    axes.set_xticks(positions, [str(rank) for rank in losses["rank"]])
    axes.set_xlim(-0.7, len(losses) - 0.3)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("rank")
    axes.set_ylabel(parts.literal(f"final {units.label}" if not units.relative else units.label))
    parts.add_squared_axis(axes, units)
    if units.relative:
        parts.note_references(axes, log_scale=log_scale)
    parts.write_legend(figure, _legend(study, losses, log_scale))
    parts.write_heading(figure, of_range(losses, units), title)
    return figure


def _legend(study: Study, losses, log_scale: bool) -> list[Artist]:
    checked = "held out" if study.held_out_predict_zero_loss is not None else "validation"
    number = "number: exact" if losses["exact"].notna().any() else f"number: {checked}"
    handles: list[Artist] = []
    for text, light in (("training", True), (f"{checked} ({number})", False)):
        if log_scale:
            point: dict[str, Any] = {"marker": "o", "linestyle": "", "markeredgecolor": GREY, "markersize": 7}
            handles.append(Line2D([], [], color=paper() if light else GREY, label=text, **point))
        else:
            handles.append(Patch(color=GREY, alpha=0.45 if light else 1.0, label=text))
    if losses["lower"].notna().any():
        text = "bounds of the floor" if losses["bracketed"].any() else "floor"
        handles.append(Line2D([], [], color=ink(), linewidth=1.8, label=text))
    return handles
