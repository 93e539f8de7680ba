"""Figures with a cost on the x axis: parameters, for one study or several, and the measured latency."""

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ks.files.columns import ISOTROPIC
from ks.report.comparison import are_of_one_weight, at_equal_size
from ks.report.figures import parts
from ks.report.figures.parts import FAMILY_COLORS, GREY, MARKERS, ink, paper, rank_colors
from ks.report.read_results import Study, Units
from ks.report.sentences import of_front, of_latency
from ks.report.summary import measured_batches


def _floors_of(study: Study) -> dict[str, pd.DataFrame]:
    """Return the floors of every family of a study, by its name; rows by parameters."""
    families = study.floor[study.floor["chain"] != ISOTROPIC]
    return {name: rows.sort_values("parameters") for name, rows in families.groupby("chain", sort=False)}


def front_of(study: Study) -> pd.DataFrame:
    """Return the least loss that a chain of any family can reach with at most so many parameters.

    A floor whose bounds differ is no loss that a chain is known to reach; trained ranks stand for such a family.
    """
    exact = bool(study.summary["loss_floor_is_exact"].fillna(True).all())
    reachable = [rows for name, rows in _floors_of(study).items() if exact or name == "lowrank"]
    trained = study.summary[["parameters", "relative_loss"]].astype(float).dropna()
    points = pd.concat([*(rows[["parameters", "relative_loss"]] for rows in reachable), trained])
    points = points.sort_values(["parameters", "relative_loss"])
    return points.assign(relative_loss=points["relative_loss"].cummin()).drop_duplicates("parameters", keep="last")


def loss_by_parameters(figure: Figure, study: Study, log_scale: bool) -> str:
    """Draw the floors of all families against their parameters, their common front, and the trained ranks.

    A trained rank is hollow where the front is lower by more than 1% of its loss: as many parameters can lose less.
    """
    (axes,) = parts.make_panels(figure)
    units, front, losses = study.units, front_of(study), _with_parameters(study)
    parts.finish_loss_axis(axes, units, losses["exact"], losses["lower"].dropna(), log_scale=log_scale)
    look: dict[str, Any] = {"color": "#F0C800", "linewidth": 7, "alpha": 0.45, "solid_capstyle": "butt"}
    look |= {"label": "front: the least loss of all", "drawstyle": "steps-post"}
    axes.plot(front["parameters"], front["relative_loss"] * units.zero, **look)
    for color, (name, rows) in zip(FAMILY_COLORS, _floors_of(study).items()):
        own = name == study.family
        look = {"color": color, "linewidth": 1.4, "linestyle": "-" if own else (0, (4, 2))}
        label = parts.floor_label(name, quick=own and bool(losses["bracketed"].any()))
        axes.plot(rows["parameters"], rows["relative_loss"] * units.zero, label=label, **look)
    color = FAMILY_COLORS[0]
    at_front = np.interp(losses["parameters"], front["parameters"], front["relative_loss"] * units.zero)
    off = at_front < 0.99 * losses["exact"]
    inside = [paper() if hollow else color for hollow in off]
    look = {"edgecolors": color, "linewidths": 1.8, "clip_on": False, "zorder": 4}
    axes.scatter(losses["parameters"], losses["exact"], 64, color=inside, **look)
    _label_points(axes, losses, color)
    _finish_parameter_axis(axes, study.dense_parameters, losses["parameters"])
    axes.plot([], [], "o", color=color, label="trained (number: rank)")
    if off.any():
        axes.scatter([], [], color=paper(), label="trained, and off the front", **look)
    parts.write_legend(figure, axes.get_legend_handles_labels()[0])
    return of_front(study, losses)


def chains(figure: Figure, studies: list[Study], log_scale: bool) -> str:
    """Draw several studies together: loss against parameters, floors as lines, trained ranks as points.

    Losses of different weights are fractions of that of the zero predictor on each, and parameters are fractions of
    those of the dense weight.

    Args:
        figure: empty.
        studies: that are `ks.report.comparison.comparable`.
        log_scale: a logarithmic loss axis.
    """
    (axes,) = parts.make_panels(figure)
    one, units, dense = are_of_one_weight(studies), studies[0].units, studies[0].dense_parameters
    if not one:
        label = "loss relative to the zero predictor" if units.words.of_model else units.label
        units, dense = Units(1.0, 1.0, label, 1.0), 1.0
    tables = [_in_units(study, units, dense) for study in studies]
    together = pd.concat(tables, keys=range(len(tables)), names=["study", None])
    parts.finish_loss_axis(axes, units, together["exact"], together["lower"].dropna(), log_scale=log_scale)
    for index, (study, losses) in enumerate(zip(studies, tables)):
        color = FAMILY_COLORS[index % len(FAMILY_COLORS)]
        own = _floors_of(study).get(study.family)
        if own is not None:
            sizes = own["parameters"] * (dense / study.dense_parameters)
            axes.plot(sizes, own["relative_loss"] * units.zero, color=color, linewidth=1.2, alpha=0.7)
        marker = MARKERS[(index + index // len(FAMILY_COLORS)) % len(MARKERS)]  # 36 studies look different
        look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": ""}
        label = textwrap.fill(parts.literal(f"{study.name}: {study.config.problem.chain}"), int(13 * parts.PANEL_WIDTH))
        look |= {"markersize": 8, "label": label, "clip_on": False}
        axes.plot(losses["parameters"], losses["exact"], **look)
        _label_points(axes, losses, color, index)
    _finish_parameter_axis(axes, dense, together["parameters"])
    parts.write_legend(figure, axes.get_legend_handles_labels()[0])
    if not one:
        return "each loss is relative to the zero predictor on the same weight"
    return at_equal_size(studies)


def _in_units(study: Study, units: Units, dense: float) -> pd.DataFrame:
    """Return the losses of the finished ranks in common units, and their sizes in units in which dense has this one."""
    losses, scale = _with_parameters(study).sort_values("parameters"), units.zero / study.units.zero
    sizes = losses["parameters"] * (dense / study.dense_parameters)
    return losses.assign(exact=losses["exact"] * scale, lower=losses["lower"] * scale, parameters=sizes)


def _with_parameters(study: Study) -> pd.DataFrame:
    """Return the losses of the ranks that have a population loss and parameters."""
    return study.losses.dropna(subset=["exact", "parameters"])


def _label_points(axes: Axes, losses: pd.DataFrame, color: str, index: int = 0) -> None:
    """Write the ranks beside their points; every study has a place of its own, for points of several may coincide."""
    away = 6 + 11 * (index // 2)
    offset, sides = ((6, away), ("left", "bottom")) if index % 2 == 0 else ((-6, -away), ("right", "top"))
    look: dict[str, Any] = {"color": color, "ha": sides[0], "va": sides[1], **parts.BESIDE}
    for parameters, group in losses.groupby("parameters"):  # ranks above saturation are one point
        place = (parameters, group["exact"].max())
        axes.annotate(", ".join(map(str, group["rank"])), place, offset, **look)


def _finish_parameter_axis(axes: Axes, dense: float, parameters: pd.Series) -> None:
    """Set limits, ticks and label of an axis of parameters, as fractions of those of dense if this has 1."""
    of_dense = dense == 1
    form = (lambda size: f"{100 * size:g}%") if of_dense else parts.count
    parts.set_log_axis(axes.xaxis, parameters.min() / 1.3, max(dense * 1.2, parameters.max()), form)
    parts.mark_dense(axes, dense, "dense" if of_dense else f"dense: {parts.count(float(f'{dense:.3g}'))}")
    axes.set_xlabel("parameters, as a fraction of those of dense" if of_dense else "parameters")


def loss_by_latency(figure: Figure, study: Study, log_scale: bool) -> str:
    """Draw the loss of every rank against the time of its forward pass, a panel for each batch size.

    Dense is a vertical line at the median of its times, which were measured in turn with each chain; a band is as wide
    as they differ.
    """
    batches, units, losses = measured_batches(study.rows), study.units, study.losses
    panels, colors = parts.make_panels(figure, len(batches)), rank_colors(study.summary["rank"])
    summary = study.summary.sort_values("rank").reset_index(drop=True)
    for axes, batch in zip(panels, batches):
        chain, dense = (summary[f"{kind}latency_ms_batch_{batch}"].astype(float) for kind in ("", "dense_"))
        parts.finish_loss_axis(axes, units, losses["best"].dropna(), log_scale=log_scale)
        shown = chain.notna() & losses["best"].notna()
        low, high = min(chain.min(), dense.min()), max(1.1 * chain.max(), 1.6 * dense.max())
        parts.set_log_axis(axes.xaxis, low / 1.1, high, "{:g}".format)
        axes.tick_params(axis="x", labelsize="small")
        axes.axvspan(dense.median(), axes.get_xlim()[1], color=GREY, alpha=0.1, linewidth=0, zorder=0)
        axes.axvspan(dense.min(), dense.max(), color=ink(), alpha=0.15, linewidth=0, zorder=1)
        axes.axvline(dense.median(), color=ink(), linewidth=1.4, zorder=1)
        parts.mark_ranks(axes, losses["rank"][shown], chain[shown], losses["best"][shown], colors)
        axes.annotate("slower\nthan dense", (0.99, 0.86), xycoords="axes fraction", ha="right", va="top", **parts.NOTE)
        axes.set_title(f"batch {batch} (dense: {dense.median():.3g} ms)", fontsize="medium", loc="left", y=1.0)
        axes.set_xlabel("milliseconds a forward pass")
        axes.tick_params(labelleft=True)
    handles: list[Artist] = [
        Line2D([], [], color=ink(), linewidth=1.4, label="dense, median"),
        Patch(color=ink(), alpha=0.15, label="dense, as measured beside each rank"),
        Line2D([], [], color=GREY, marker="o", linestyle="", label="trained (number: rank)"),
    ]
    parts.write_legend(figure, handles)
    return of_latency(study.rows)
