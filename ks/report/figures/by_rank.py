"""Figures with the rank on the x axis: the final losses beside each other, and the floor of every rank."""

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ks.files.columns import ISOTROPIC
from ks.report.figures import parts
from ks.report.figures.parts import GREY, ink, paper, rank_colors
from ks.report.read_results import Study
from ks.report.sentences import of_floors, of_range

ASIDE = 0.2  # of the distance of two ranks: training to the left, validation to the right


def final_losses(figure: Figure, study: Study, log_scale: bool) -> str:
    """Draw the final training and validation loss of every rank, with a tick at its floor or a bracket of its bounds.

    On a linear axis they are bars from 0; a logarithmic axis has no such foot and shows points. For a rank
    without a loss, its status is written there. Whiskers are standard errors over seeds.
    """
    units, losses, colors = study.units, study.losses, rank_colors(study.summary["rank"])
    (axes,) = parts.make_panels(figure)
    positions = np.arange(len(losses))
    fills = [colors[rank] for rank in losses["rank"]]
    values, floors = losses[["train", "validation", "exact"]], losses[["lower", "upper"]]
    parts.finish_loss_axis(axes, units, values.to_numpy(float).ravel(), floors.to_numpy().ravel(), log_scale=log_scale)
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
    close = len(losses) > 6  # their values would touch
    for position, row in enumerate(losses.itertuples()):
        top = np.nanmax([row.train, row.validation, row.upper, 0.0])
        place: dict[str, Any] = {"fontsize": "small", "ha": "center", "va": "bottom"}
        if np.isfinite(row.best) and top > 0:
            place |= {"textcoords": "offset points", "rotation": 90 if close else 0, "zorder": 6}
            axes.annotate(units.show(row.best), (position, top), (0, 5), **place)
        elif not np.isfinite(row.best):
            place |= {"xycoords": ("data", "axes fraction"), "rotation": 90, "color": "firebrick"}
            axes.annotate(parts.literal(row.status), (position, 0.06), **place)
    axes.set_xticks(positions, [str(rank) for rank in losses["rank"]])
    axes.set_xlim(-0.7, len(losses) - 0.3)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("rank")
    if not units.relative:
        axes.set_ylabel(parts.literal(f"final {units.label}"))
    parts.add_squared_axis(axes, units)
    parts.write_legend(figure, _legend(study, log_scale))
    return of_range(study)


def _legend(study: Study, log_scale: bool) -> list[Artist]:
    held_out = study.config.problem.held_out_predict_zero_loss is not None
    losses, checked = study.losses, "held out" if held_out else "validation"
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


def has_floors(study: Study) -> bool:
    """Return whether a rank of the study has a floor, a loss and parameters."""
    needed = study.summary[["relative_loss", "parameters", "loss_floor"]]
    return len(study.floor) > 0 and study.units.relative and bool(needed.notna().all(axis=1).any())


def floor_by_rank(figure: Figure, study: Study, log_scale: bool) -> str:
    """Draw the floor of every rank, and the trained ranks, each with both bounds where they differ."""
    (axes,) = parts.make_panels(figure)
    units, family, losses, colors = study.units, study.family, study.losses, rank_colors(study.summary["rank"])
    losses = losses[losses["lower"].notna() & losses["exact"].notna()]
    own = study.floor[study.floor["chain"] == family]
    isotropic = study.floor[study.floor["chain"] == ISOTROPIC]
    between = losses[losses["bracketed"]]
    bounds = losses[["lower", "upper"]].to_numpy().ravel()
    parts.finish_loss_axis(axes, units, losses["exact"], bounds, log_scale=log_scale)
    look: dict[str, Any] = {"color": ink(), "linewidth": 1.5, "label": parts.floor_label(family, len(between) > 0)}
    axes.plot(own["rank"], own["relative_loss"] * units.zero, **look)
    if len(isotropic):
        look = {"color": GREY, "linestyle": (0, (1, 2)), "label": "floor if inputs were isotropic"}
        axes.plot(isotropic["rank"], isotropic["relative_loss"] * units.zero, **look)
    parts.mark_ranks(axes, losses["rank"], losses["rank"], losses["exact"], colors)
    if len(between):
        axes.vlines(between["rank"], between["lower"], between["upper"], color=ink(), linewidth=1.2, zorder=3)
        ends = between.melt("rank", ["lower", "upper"])
        caps: dict[str, Any] = {"color": ink(), "markersize": 9, "markeredgewidth": 1.4, "zorder": 3}
        axes.plot(ends["rank"], ends["value"], "_", label="bounds of a trained rank", **caps)
    if study.target is not None:
        look = {"color": "#009E73", "linewidth": 1.2, "linestyle": (0, (6, 2)), "zorder": 1}
        axes.axhline(study.target * units.zero, label="target", **look)
    parts.set_log_axis(axes.xaxis, 1, max(own["rank"].max(), losses["rank"].max()), parts.count)
    dense = own["rank"][own["parameters"] >= study.dense_parameters]
    if len(dense):
        parts.mark_dense(axes, dense.min(), "as large as dense")
    axes.set_xlabel("rank")
    parts.add_squared_axis(axes, units)
    axes.plot([], [], "o", color=GREY, label="trained (number: rank)")
    parts.write_legend(figure, axes.get_legend_handles_labels()[0])
    return of_floors(study)
