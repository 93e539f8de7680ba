"""Loss against parameters: the front over families, the trained ranks of one study or of several, and dense."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ks.errors import UsageError
from ks.files.columns import ISOTROPIC
from ks.report.figures import parts
from ks.report.figures.colors import FAMILY_COLORS, GREY, MARKERS, paper
from ks.report.sentences import of_front
from ks.report.study import Study, dense_parameters, family_of
from ks.report.units import Units, losses_of, units_of


def curves_of(study: Study) -> dict[str, pd.DataFrame]:
    """Return the floors of every family of a study, by its name; rows by parameters."""
    families = study.floor[study.floor["chain"] != ISOTROPIC]
    return {name: rows.sort_values("parameters") for name, rows in families.groupby("chain", sort=False)}


def front_of(study: Study) -> pd.DataFrame:
    """Return the least loss that a chain of any family can reach with at most so many parameters.

    A floor whose bounds differ is no loss that a chain is known to reach; trained ranks stand for such a family.
    """
    exact = bool(study.summary["loss_floor_is_exact"].fillna(True).all())
    reachable = [rows for name, rows in curves_of(study).items() if exact or name == "lowrank"]
    trained = study.summary[["parameters", "relative_loss"]].astype(float).dropna()
    points = pd.concat([*(rows[["parameters", "relative_loss"]] for rows in reachable), trained])
    points = points.sort_values(["parameters", "relative_loss"])
    return points.assign(relative_loss=points["relative_loss"].cummin()).drop_duplicates("parameters", keep="last")


def loss_by_parameters(study: Study, *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Draw the floors of all families against their parameters, their common front, and the trained ranks.

    A trained rank is hollow where the front is lower by more than 1% of its loss: as many parameters can lose less.

    Args:
        study: for which `ks.report.figures.floor.has_floors` holds.
        log_scale: logarithmic loss axis.
        title: below the finding.
        figsize: (width, height) in inches.
    """
    figure = Figure(figsize=figsize or (8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    units, front = units_of(study), front_of(study)
    losses = losses_of(study, units)
    losses = losses[losses["exact"].notna() & losses["parameters"].notna()]
    parts.finish_loss_axis(axes, units, losses["exact"], losses["lower"].dropna(), log_scale=log_scale)
    look: dict[str, Any] = {"color": "#F0C800", "linewidth": 7, "alpha": 0.45, "solid_capstyle": "butt"}
    axes.plot(
        front["parameters"],
        front["relative_loss"],
        label="front: the least loss of all",
        drawstyle="steps-post",
        **look,
    )
    family = family_of(study)
    bracketed = bool(losses["bracketed"].any())
    _draw_families(axes, study, {family: f"{family}: quick lower bound of every rank"} if bracketed else {})
    color = FAMILY_COLORS[0]
    at_front = np.interp(losses["parameters"], front["parameters"], front["relative_loss"])
    for row, least in zip(losses.itertuples(), at_front):
        dominated = least < 0.99 * row.exact
        look = {"color": paper() if dominated else color, "markeredgecolor": color}
        axes.plot(row.parameters, row.exact, "o", markersize=8, clip_on=False, markeredgewidth=1.8, zorder=4, **look)
    _label_points(axes, losses, color)
    _finish(axes, units, [study], losses["parameters"], log_scale)
    axes.plot([], [], "o", color=color, label="trained (number: rank)")
    axes.plot(
        [], [], "o", color=paper(), markeredgecolor=color, markeredgewidth=1.8, label="trained, and off the front"
    )
    parts.write_legend(figure, axes.get_legend_handles_labels()[0])
    parts.write_heading(
        figure, of_front(losses, study.lowrank_beside(losses["parameters"])["relative_loss"], family), title
    )
    return figure


def chains(studies: list[Study], *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Draw several studies in one figure: loss against parameters, floors as lines, trained ranks as points.

    Args:
        studies: with relative losses and parameters, which those of the 2025 ksmm scripts lack.
        log_scale: logarithmic loss axis.
        title: below the finding.
        figsize: (width, height) in inches.
    Raises:
        UsageError: a study has none.
    """
    figure = Figure(figsize=figsize or (9, 5.5), layout="constrained")
    axes = figure.subplots()
    units = units_of(studies[0])
    tables = []
    for study in studies:
        losses = losses_of(study, units_of(study))
        losses = losses[losses["exact"].notna() & losses["parameters"].notna()].sort_values("parameters")
        if losses.empty or not units_of(study).relative:
            raise UsageError(
                f"{study.name} has no relative losses and parameters; only studies of this toolkit compare"
            )
        tables.append(losses)
    together = pd.concat(tables, keys=range(len(tables)), names=["study", None])
    parts.finish_loss_axis(axes, units, together["exact"], together["lower"].dropna(), log_scale=log_scale)
    for index, (study, losses) in enumerate(zip(studies, tables)):
        color = FAMILY_COLORS[index % len(FAMILY_COLORS)]
        own = curves_of(study).get(family_of(study)) if len(study.floor) else None
        if own is not None:
            axes.plot(own["parameters"], own["relative_loss"], color=color, linewidth=1.2, alpha=0.7)
        look: dict[str, Any] = {"color": color, "marker": MARKERS[index % len(MARKERS)], "linestyle": ""}
        axes.plot(
            losses["parameters"],
            losses["exact"],
            markersize=8,
            label=parts.literal(f"{study.name}: {study.chain}"),
            **look,
        )
        _label_points(axes, losses, color)
    _finish(axes, units, studies, together["parameters"], log_scale)
    parts.write_legend(figure, axes.get_legend_handles_labels()[0])
    place, rank = together["exact"].idxmin(), together["rank"][together["exact"].idxmin()]
    best = f"the least loss is {units.show(together['exact'].min())}: {studies[place[0]].name}, rank {rank}"
    parts.write_heading(figure, best, title or "points: trained (number: rank); lines: floors")
    return figure


def _draw_families(axes: Axes, study: Study, labels: dict[str, str]) -> None:
    own = family_of(study)
    lines = iter(((0, (4, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1))) * 3)
    for index, (name, rows) in enumerate(curves_of(study).items()):
        look: dict[str, Any] = {"color": FAMILY_COLORS[index % len(FAMILY_COLORS)], "linewidth": 1.4}
        label = parts.literal(labels.get(name, f"{name}: floor of every rank"))
        line = "-" if name == own else next(lines)
        axes.plot(rows["parameters"], rows["relative_loss"], linestyle=line, label=label, **look)


def _label_points(axes: Axes, losses: pd.DataFrame, color: str) -> None:
    place: dict[str, Any] = {"textcoords": "offset points", "fontsize": "small", "fontweight": "bold", "color": color}
    for parameters, group in losses.groupby("parameters"):  # ranks above saturation are one point
        axes.annotate(", ".join(map(str, group["rank"])), (parameters, group["exact"].max()), (6, 6), **place)


def _finish(axes: Axes, units: Units, studies: list[Study], parameters: pd.Series, log_scale: bool) -> None:
    dense = dense_parameters(studies[0])
    parts.set_log_axis(axes.xaxis, parameters.min() / 1.3, max(dense * 1.2, parameters.max()), parts.count)
    axes.axvline(dense, color=GREY, linewidth=1.0, zorder=1)
    place: dict[str, Any] = {
        "xycoords": ("data", "axes fraction"),
        "textcoords": "offset points",
        "ha": "right",
        **parts.NOTE,
    }
    axes.annotate(f"dense: {parts.count(float(f'{dense:.3g}'))}", (dense, 0.8), (-4, 0), **place)
    axes.set_xlabel("parameters")
    axes.set_ylabel(units.label)
    parts.note_references(axes, log_scale=log_scale)
