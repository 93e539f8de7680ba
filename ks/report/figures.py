"""The figures of a study: DataFrames in, matplotlib figures out; no display is needed."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ks.errors import UsageError
from ks.files.atomic import atomic_path
from ks.files.columns import ISOTROPIC
from ks.files.layout import SweepFiles
from ks.report.axes import (
    GREY,
    above_zero,
    add_headroom,
    finish_axes,
    finish_parameter_axis,
    heading,
    label_ends,
    limit_log_axis,
    literal,
    padded,
)
from ks.report.study import Study
from ks.training.losses import LossKind

# What the floor figure needs of a rank.
COMPARED = ("relative_loss", "parameters", "compression_ratio", "population_loss", "loss_floor")
LOSS_LABEL = LossKind.MEAN_SQUARED_ERROR.value


def rank_colors(ranks) -> dict[int, tuple]:
    """Return a colour for each rank, from dark to light; viridis without its palest end suits colour-blind readers."""
    ranks = sorted(ranks)
    positions = np.linspace(0.0, 0.88, len(ranks)) if len(ranks) > 1 else [0.3]
    return {rank: colormaps["viridis"](position) for rank, position in zip(ranks, positions)}


def loss_curves(
    curves: pd.DataFrame,
    summary: pd.DataFrame,
    *,
    log_scale: bool = False,
    title: str | None = None,
    figsize=None,
    loss_label: str = LOSS_LABEL,
) -> Figure:
    """Draw training and validation loss against the epoch, side by side on one scale, with a line for each rank.

    The floor of a rank is dashed in its colour. A rank trained with several seeds has a band of one standard error to
    each side of its mean. The lines of ranks that did not finish are dotted and marked.

    Args:
        curves: columns epoch, train_loss, val_loss, rank and, with several seeds, seed.
        summary: columns rank, num_seeds and, where there is a floor, loss_floor.
        log_scale: logarithmic loss axis.
        title: above both panels.
        figsize: (width, height) in inches.
        loss_label: of the loss axis.
    """
    figure = Figure(figsize=figsize or (12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = rank_colors(summary["rank"])
    failed = set(summary["rank"][summary["num_seeds"] == 0])
    floors = summary.set_index("rank")["loss_floor"].astype(float).dropna()
    ends: dict[Axes, list] = {axes: [] for axes in panels}
    for axes, column, name in zip(panels, ("train_loss", "val_loss"), ("Training", "Validation")):
        for rank, run in curves.groupby("rank"):
            band = run[np.isfinite(run[column])].groupby("epoch")[column].agg(["mean", "sem"])
            if band.empty:
                continue
            style: dict[str, Any] = {"color": colors[rank], "linewidth": 1.8, "marker": "o" if len(band) == 1 else None}
            axes.plot(band.index, band["mean"], ":" if rank in failed else "-", **style)
            spread = band["sem"].fillna(0.0)
            if spread.any():
                axes.fill_between(
                    band.index,
                    band["mean"] - spread,
                    band["mean"] + spread,
                    color=colors[rank],
                    alpha=0.25,
                    linewidth=0,
                )
            label = f"{rank} (failed)" if rank in failed else f"{rank}"
            ends[axes].append((band.index[-1], band["mean"].iloc[-1], label, colors[rank]))
        for rank, floor in floors.items():
            if not log_scale or floor > 0:
                axes.axhline(floor, color=colors[rank], linestyle=(0, (4, 3)), linewidth=1.0)
        axes.set_title(f"{name} loss")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(padded(curves["epoch"].min(), curves["epoch"].max()))
    if log_scale and len(floors):
        limit_log_axis(panels[0], curves[["train_loss", "val_loss"]].to_numpy(), floors.to_numpy())
    for axes in panels:
        finish_axes(axes, log_scale)
    hidden = [str(rank) for rank, floor in floors.items() if log_scale and floor < panels[0].get_ylim()[0]]
    if len(floors):
        panels[1].plot([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=1.0, label="floor of each rank")
        title_of_legend = f"floor below the axis: rank {', '.join(hidden)}" if hidden else None
        panels[1].legend(loc="best", framealpha=0.85, edgecolor="none", title=title_of_legend, title_fontsize=9)
    for axes in panels:
        label_ends(axes, ends[axes], "rank")
    panels[0].set_ylabel(literal(loss_label))
    panels[1].tick_params(labelleft=True)
    if title:
        figure.suptitle(heading(title, figure))
    return figure


def final_losses(
    summary: pd.DataFrame,
    *,
    log_scale: bool = False,
    title: str | None = None,
    figsize=None,
    loss_label: str = LOSS_LABEL,
) -> Figure:
    """Draw the final training and validation loss of every rank as bars, with a tick at its floor.

    A rank without a loss shows its status instead. Whiskers are standard errors over seeds.

    Args:
        summary: columns of `ks.files.columns.SUMMARY`.
        log_scale: logarithmic loss axis; bars then start at the axis' foot, so compare their tops.
        title: of the figure.
        figsize: (width, height) in inches.
        loss_label: of the loss axis.
    """
    summary = summary.sort_values("rank").reset_index(drop=True)
    figure = Figure(figsize=figsize or (max(6.0, 2.5 + 0.75 * len(summary)), 4.8), layout="constrained")
    axes = figure.subplots()
    colors = rank_colors(summary["rank"])
    fills = [colors[rank] for rank in summary["rank"]]
    positions = np.arange(len(summary))
    heights = {}
    for split, shift, alpha in (("train", -0.2, 0.45), ("val", 0.2, 1.0)):
        heights[split] = summary[f"final_{split}_loss"].to_numpy(float)
        errors = summary[f"final_{split}_loss_se"].to_numpy(float)
        shown = errors if np.isfinite(errors).any() else None
        axes.bar(positions + shift, heights[split], 0.38, color=fills, alpha=alpha, yerr=shown, ecolor=GREY, capsize=3)
    floors = summary["loss_floor"].to_numpy(float)
    if log_scale:
        limit_log_axis(axes, np.append(heights["train"], heights["val"]), floors)
    finish_axes(axes, log_scale)
    add_headroom(axes, 0.12)
    axes.hlines(floors, positions - 0.44, positions + 0.44, color="black", linewidth=2.0)
    for position, row in summary.iterrows():
        if np.isfinite(heights["val"][position]):
            text = f"{heights['val'][position]:.3g}"
            place: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "ha": "center"}
            axes.annotate(text, (position + 0.2, heights["val"][position]), (0, 3), **place)
        else:
            place = {"xycoords": ("data", "axes fraction"), "fontsize": 9, "ha": "center", "va": "bottom"}
            axes.annotate(literal(row["status"]), (position, 0.02), rotation=90, color="firebrick", **place)
    axes.set_xticks(positions, [str(rank) for rank in summary["rank"]])
    axes.set_xlim(-0.6, len(summary) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("rank")
    axes.set_ylabel(literal(f"final {loss_label}"))
    axes.set_title(heading(title or "Final loss by rank", figure), loc="left", fontsize="medium")
    handles: list[Artist] = [
        Patch(color=GREY, alpha=0.45, label="training"),
        Patch(color=GREY, label="validation (numbers)"),
    ]
    if np.isfinite(floors).any():
        handles.append(Line2D([], [], color="black", linewidth=2.0, label="floor"))
    axes.legend(handles=handles, frameon=False, ncols=3, loc="upper right")
    return figure


def floor_curve(
    floor: pd.DataFrame, summary: pd.DataFrame, *, log_scale: bool = False, title: str | None = None, figsize=None
) -> Figure:
    """Draw the floor of every rank against its parameters, with the trained ranks and low-rank at equal parameters.

    Args:
        floor: columns of `ks.files.columns.FLOOR`; the chain's own rows, and those of 'lowrank'.
        summary: columns of `ks.files.columns.SUMMARY`.
        log_scale: logarithmic loss axis.
        title: of the figure.
        figsize: (width, height) in inches.
    """
    figure = Figure(figsize=figsize or (8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    own = [name for name in floor["chain"].unique() if name not in ("lowrank", ISOTROPIC)] or ["lowrank"]
    exact = bool(summary["loss_floor_is_exact"].fillna(True).all())
    summary = summary.astype(dict.fromkeys(COMPARED, float))
    trained = summary[summary[list(COMPARED)].notna().all(axis=1)]
    dense = float((summary["parameters"] * summary["compression_ratio"]).dropna().iloc[0])
    for name, group in floor.groupby("chain", sort=False):
        style: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 3))}
        label = "low-rank at equal parameters"
        if name in own:
            style = {"color": "black", "linewidth": 1.6}
            label = literal(f"{name}: floor of every rank" if exact else f"{name}: no rank can lose less")
        elif name == ISOTROPIC:
            style = {"color": GREY, "linestyle": (0, (1, 2))}
            label = literal(f"{own[0]}: floor if inputs were isotropic")
        axes.plot(group["parameters"], above_zero(group["relative_loss"], log_scale), label=label, **style)
    axes.axhline(1.0, color="0.6", linewidth=1.0)
    axes.axvline(dense, color="0.6", linewidth=1.0)
    colors = rank_colors(summary["rank"])
    for parameters, group in trained.groupby("parameters"):
        color = colors[group["rank"].iloc[0]]  # ranks above saturation are one point
        axes.plot(group["parameters"], group["relative_loss"], "o", markersize=9, color=color, markeredgecolor="white")
        place: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "fontweight": "bold", "color": color}
        axes.annotate(", ".join(map(str, group["rank"])), (parameters, group["relative_loss"].max()), (6, 6), **place)
    if not exact:
        scale = trained["relative_loss"] / trained["population_loss"]
        bounds = [above_zero(trained[name] * scale, log_scale) for name in ("loss_floor", "loss_floor_upper")]
        axes.vlines(trained["parameters"], *bounds, color="black", linewidth=1.6, label="between its bounds")
    axes.set_xscale("log")
    axes.set_xlim(floor["parameters"].min() / 1.3, max(dense * 1.5, trained["parameters"].max() * 1.3))
    if log_scale:
        floors = (summary["loss_floor"] / summary["population_loss"] * summary["relative_loss"]).to_numpy(float)
        limit_log_axis(axes, np.append(trained["relative_loss"].to_numpy(float), 1.0), floors)
    finish_axes(axes, log_scale)
    add_headroom(axes, 0.04)
    axes.annotate("predicting 0", (0.01, 1.0), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  color=GREY, fontsize=9)  # fmt: skip
    axes.annotate("dense", (dense, 0.97), (-4, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                  ha="right", color=GREY, fontsize=9)  # fmt: skip
    finish_parameter_axis(axes)
    axes.set_title(heading(title or "Floor by parameters", figure), loc="left", fontsize="medium")
    handles, _ = axes.get_legend_handles_labels()
    if len(trained):
        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", label="trained (number: rank)"))
    axes.legend(handles=handles, frameon=False, loc="lower left" if not log_scale else "best")
    return figure


def study_figures(
    study: Study, *, log_scale: bool = False, title: str | None = None, figsize=None
) -> dict[str, Figure]:
    """Return every figure that a study has the data for, by the name in its file name."""
    look: dict[str, Any] = {"log_scale": log_scale, "title": title or study.title, "figsize": figsize}
    figures = {}
    if len(study.curves):
        figures["loss_curves"] = loss_curves(study.curves, study.summary, loss_label=study.loss_label, **look)
    figures["final_losses"] = final_losses(study.summary, loss_label=study.loss_label, **look)
    if len(study.floor) and study.summary[list(COMPARED)].notna().all(axis=1).any():
        figures["floor"] = floor_curve(study.floor, study.summary, **look)
    return figures


def chains(studies: list[Study], *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Draw several studies in one figure: loss against parameters, floors as lines, trained ranks as points.

    Args:
        studies: with relative losses and parameters, which those of the 2025 ksmm scripts lack.
        log_scale: logarithmic loss axis.
        title: of the figure.
        figsize: (width, height) in inches.
    Raises:
        UsageError: a study has none.
    """
    figure = Figure(figsize=figsize or (9, 5.5), layout="constrained")
    axes = figure.subplots()
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")  # Okabe and Ito
    markers = "osD^vP*X"
    losses, ends = [1.0], []
    for index, study in enumerate(studies):
        trained = study.summary[study.summary["relative_loss"].notna()].sort_values("parameters")
        if trained.empty:
            raise UsageError(
                f"{study.name} has no relative losses and parameters; only studies of this toolkit compare"
            )
        look: dict[str, Any] = {"color": palette[index % len(palette)], "marker": markers[index % len(markers)]}
        own = study.floor[study.floor["chain"] == (study.chain or "").split(" ")[0]]
        line: dict[str, Any] = {"color": look["color"], "linewidth": 1.2, "alpha": 0.7}
        axes.plot(own["parameters"], above_zero(own["relative_loss"], log_scale), **line)
        label = literal(f"{study.name}: {study.chain}")
        axes.plot(trained["parameters"], trained["relative_loss"], linestyle="", markersize=8, label=label, **look)
        losses += list(trained["relative_loss"])
        ends += list(trained["parameters"])
        for _, row in trained.iterrows():
            place: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": look["color"]}
            axes.annotate(f"{row['rank']}", (row["parameters"], row["relative_loss"]), (5, 5), **place)
    axes.set_xscale("log")
    axes.set_xlim(min(ends) / 1.5, max(ends) * 1.5)
    if log_scale:
        limit_log_axis(axes, np.array(losses), np.empty(0))
    finish_axes(axes, log_scale)
    finish_parameter_axis(axes)
    axes.set_title(
        heading(title or "Chains side by side (points: trained, number: rank; lines: floors)", figure),
        loc="left",
        fontsize="medium",
    )
    axes.legend(frameon=False)
    return figure


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
