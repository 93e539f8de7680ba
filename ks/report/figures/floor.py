"""The floor of every rank, and the trained ranks on it."""

from typing import Any

from matplotlib.figure import Figure

from ks.files.columns import ISOTROPIC
from ks.report.figures import parts
from ks.report.figures.colors import GREY, ink, paper, rank_colors
from ks.report.sentences import of_floors
from ks.report.study import Study, dense_parameters, family_of
from ks.report.units import losses_of, units_of


def has_floors(study: Study) -> bool:
    """Return whether a rank of the study has a floor, a loss and parameters."""
    needed = study.summary[["relative_loss", "parameters", "loss_floor"]]
    return len(study.floor) > 0 and units_of(study).relative and bool(needed.notna().all(axis=1).any())


def floor_by_rank(study: Study, *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Draw the floor of every rank, and the trained ranks, each with both bounds where they differ.

    Args:
        study: for which `has_floors` holds.
        log_scale: logarithmic loss axis.
        title: below the finding.
        figsize: (width, height) in inches.
    """
    figure = Figure(figsize=figsize or (8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    units, family = units_of(study), family_of(study)
    losses, colors = losses_of(study, units), rank_colors(study.summary["rank"])
    losses = losses[losses["lower"].notna() & losses["exact"].notna()]
    own = study.floor[study.floor["chain"] == family]
    isotropic = study.floor[study.floor["chain"] == ISOTROPIC]
    bracketed = bool(losses["bracketed"].any())
    bounds = losses[["lower", "upper"]].to_numpy().ravel()
    parts.finish_loss_axis(axes, units, losses["exact"], bounds, log_scale=log_scale)
    label = parts.literal(
        f"{family}: quick lower bound of every rank" if bracketed else f"{family}: floor of every rank"
    )
    axes.plot(own["rank"], own["relative_loss"], color=ink(), linewidth=1.5, label=label)
    if len(isotropic):
        look: dict[str, Any] = {"color": GREY, "linestyle": (0, (1, 2)), "label": "floor if inputs were isotropic"}
        axes.plot(isotropic["rank"], isotropic["relative_loss"], **look)
    parts.mark_ranks(axes, losses["rank"], losses["rank"], losses["exact"], colors)
    between = losses[losses["bracketed"]]
    if len(between):
        axes.vlines(between["rank"], between["lower"], between["upper"], color=ink(), linewidth=1.2, zorder=3)
        caps: dict[str, Any] = {"color": ink(), "linestyle": "", "markersize": 9, "markeredgewidth": 1.4, "zorder": 3}
        axes.plot(between["rank"], between["lower"], marker="_", **caps)
        label = "bounds of a trained rank"
        axes.plot(between["rank"], between["upper"], marker="_", label=label, **caps)
    if study.target is not None:
        axes.axhline(study.target, color="#009E73", linewidth=1.2, linestyle=(0, (6, 2)), label="target", zorder=1)
    parts.set_log_axis(axes.xaxis, 1, max(own["rank"].max(), losses["rank"].max()), parts.count)
    dense = own["rank"][own["parameters"] >= dense_parameters(study)]
    if len(dense):
        axes.axvline(dense.min(), color=GREY, linewidth=1.0, zorder=1)
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", **parts.NOTE}
        place |= {"ha": "right", "bbox": {"facecolor": paper(), "alpha": 0.8, "edgecolor": "none", "pad": 1}}
        axes.annotate("as many parameters\nas dense", (dense.min(), 0.72), (-4, 0), va="top", **place)
    axes.set_xlabel("rank")
    axes.set_ylabel(units.label)
    parts.add_squared_axis(axes, units)
    parts.note_references(axes, log_scale=log_scale)
    axes.plot([], [], "o", color=GREY, label="trained (number: rank)")
    parts.write_legend(figure, axes.get_legend_handles_labels()[0])
    parts.write_heading(figure, of_floors(losses, own, units, study.target), title)
    return figure
