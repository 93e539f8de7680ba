"""Figures of a study: DataFrames in, matplotlib Figures out. Only this file imports matplotlib; it needs no display."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from ks.results import SweepFiles, atomic_path

GREY = "0.35"


def rank_colors(ranks) -> dict[int, tuple]:
    """One colour per rank, dark to light by rank; viridis without its palest end is safe for the colour-blind."""
    ranks = sorted(ranks)
    positions = np.linspace(0.0, 0.88, len(ranks)) if len(ranks) > 1 else [0.3]
    return {rank: colormaps["viridis"](position) for rank, position in zip(ranks, positions)}


def loss_curves(
    curves: pd.DataFrame, *, log_scale: bool = False, title: str | None = None, figsize=None, failed: tuple = ()
) -> Figure:
    """Training and validation loss against the epoch, side by side on one scale, a line per rank.

    Args:
        curves: columns epoch, train_loss, val_loss, rank; losses in squared output units.
        log_scale: logarithmic loss axis.
        title: above both panels.
        figsize: (width, height) in inches.
        failed: ranks whose run did not finish; their lines are dotted and marked.
    """
    figure = Figure(figsize=figsize or (12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = rank_colors(curves["rank"].unique())
    ends = {axes: [] for axes in panels}
    for axes, column, name in zip(panels, ("train_loss", "val_loss"), ("Training", "Validation")):
        for rank, run in curves.groupby("rank"):
            run = run[np.isfinite(run[column])]
            if run.empty:
                continue
            marker = "o" if len(run) == 1 else None
            style = ":" if rank in failed else "-"
            axes.plot(run["epoch"], run[column], style, color=colors[rank], marker=marker, linewidth=1.8)
            label = f"{rank} (failed)" if rank in failed else f"{rank}"
            ends[axes].append((run["epoch"].iloc[-1], run[column].iloc[-1], label, colors[rank]))
        axes.set_title(f"{name} loss")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(_padded(curves["epoch"].min(), curves["epoch"].max()))
    for axes in panels:
        _finish_axes(axes, log_scale)
        _label_ends(axes, ends[axes])
    panels[0].set_ylabel("mean squared error per output")
    panels[1].tick_params(labelleft=True)
    if title:
        figure.suptitle(title)
    return figure


def final_losses(summary: pd.DataFrame, *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Bars of the final training and validation loss of every rank; a rank without a loss shows its status instead.

    Args:
        summary: columns rank, final_train_loss, final_val_loss and, where known, status.
        log_scale: logarithmic loss axis; bars then start at the axis' foot, so compare their tops.
        title: of the figure.
        figsize: (width, height) in inches.
    """
    summary = summary.sort_values("rank").reset_index(drop=True)
    figure = Figure(figsize=figsize or (max(6.0, 2.5 + 0.75 * len(summary)), 4.8), layout="constrained")
    axes = figure.subplots()
    colors = rank_colors(summary["rank"])
    fills = [colors[rank] for rank in summary["rank"]]
    positions = np.arange(len(summary))
    train, validation = (summary[f"final_{split}_loss"].to_numpy(float) for split in ("train", "val"))
    axes.bar(positions - 0.2, train, 0.38, color=fills, alpha=0.45)
    axes.bar(positions + 0.2, validation, 0.38, color=fills)
    _finish_axes(axes, log_scale)
    _add_headroom(axes, 0.12)
    for position, (_, row) in zip(positions, summary.iterrows()):
        if np.isfinite(validation[position]):
            height = np.nanmax([validation[position], train[position]])
            axes.annotate(
                f"{row['final_val_loss']:.3g}",
                (position, height),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        else:
            axes.annotate(
                str(row.get("status", "no result")),
                (position, 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="center",
                va="bottom",
                color="firebrick",
                fontsize=9,
            )
    axes.set_xticks(positions, [str(rank) for rank in summary["rank"]])
    axes.set_xlim(-0.6, len(summary) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("rank")
    axes.set_ylabel("final mean squared error per output")
    axes.set_title(title or "Final loss by rank", loc="left", fontsize="medium")
    handles = [Patch(color=GREY, alpha=0.45), Patch(color=GREY)]
    axes.legend(handles, ["training", "validation (numbers)"], frameon=False, ncols=2, loc="upper right")
    return figure


def study_figures(
    curves: pd.DataFrame, summary: pd.DataFrame, *, log_scale: bool = False, title: str | None = None, figsize=None
) -> dict[str, Figure]:
    """Every figure of a study by the name that its file carries; curves may be empty, then only the bars are drawn.

    Args:
        curves, summary: as `loss_curves` and `final_losses` take them.
        log_scale, title, figsize: likewise.
    """
    look = {"log_scale": log_scale, "title": title, "figsize": figsize}
    failed = tuple(summary["rank"][summary["status"] != "ok"]) if "status" in summary else ()
    figures = {"final_losses": final_losses(summary, **look)}
    if len(curves):
        figures = {"loss_curves": loss_curves(curves, failed=failed, **look)} | figures
    return figures


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
    """Open windows for the figures and wait.

    Raises:
        ValueError: there is no display.
    """
    import matplotlib
    from matplotlib import pyplot

    if matplotlib.get_backend().lower() == "agg":
        raise ValueError("--show needs a display and a matplotlib GUI backend; the figures are saved without it")
    for figure in figures:
        canvas = pyplot.figure().canvas
        canvas.manager.canvas.figure = figure
        figure.set_canvas(canvas.manager.canvas)
    pyplot.show()


def _add_headroom(axes: Axes, share: float) -> None:
    """Lengthen the loss axis upwards by a share of its length, for labels and legend above the bars."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low, high * (high / low) ** share)
    else:
        axes.set_ylim(low, high + (high - low) * share)


def _padded(low: float, high: float) -> tuple[float, float]:
    """Limits a little wider than the data; of width one where that is a single value."""
    margin = 0.02 * (high - low) or 0.5
    return low - margin, high + margin


def _finish_axes(axes: Axes, log_scale: bool) -> None:
    """Grid, spines and, on a log axis, labelled ticks within a decade too when it spans few of them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if not log_scale:
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    widen = max(0.0, 0.5 - np.log10(high / low)) / 2
    low, high = axes.set_ylim(low * 10**-widen, high * 10**widen)
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(np.arange(1.0, 10.0))
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if decades <= 3:
        formatter = ScalarFormatter()
        formatter.set_scientific(False)
        axes.yaxis.set_major_formatter(formatter)


def _label_ends(axes: Axes, ends: list) -> None:
    """Write each rank at the end of its line, pushed apart where lines end close together."""
    if not ends:
        return

    def height_of(x, y):
        return axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]

    points = sorted((height_of(x, y), x, y, label, color) for x, y, label, color in ends)
    height_points = axes.get_position().height * axes.figure.get_figheight() * 72
    gap = min(9.5 / max(height_points, 1.0), 1.0 / len(points))
    heights = [point[0] for point in points]
    for _ in range(200):
        for index in range(1, len(heights)):
            overlap = gap - (heights[index] - heights[index - 1])
            if overlap > 0:
                heights[index - 1] -= overlap / 2
                heights[index] += overlap / 2
        shift = max(0.0, gap / 2 - heights[0])
        heights = [height + shift for height in heights]
    for height, (_, x, y, label, color) in zip(heights, points):
        axes.annotate(
            label,
            (x, y),
            (1.02, height),
            textcoords="axes fraction",
            color=color,
            fontsize=9,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "relpos": (0, 0.5)},
        )
    axes.annotate(
        "rank", (1.02, max(heights) + 1.4 * gap), xycoords="axes fraction", color=GREY, fontsize=9, va="center"
    )
