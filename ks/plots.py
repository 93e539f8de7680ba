"""Figures of a study: DataFrames in, matplotlib Figures out. Only this file imports matplotlib; it needs no display."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from ks.results import SweepFiles, atomic_path
from ks.study import Study

GREY = "0.35"
LOSS_LABEL = "mean squared error per output"
RELATIVE_LABEL = "loss relative to predicting 0"


def rank_colors(ranks) -> dict[int, tuple]:
    """One colour per rank, dark to light by rank; viridis without its palest end is safe for the colour-blind."""
    ranks = sorted(ranks)
    positions = np.linspace(0.0, 0.88, len(ranks)) if len(ranks) > 1 else [0.3]
    return {rank: colormaps["viridis"](position) for rank, position in zip(ranks, positions)}


def loss_curves(
    curves: pd.DataFrame, summary: pd.DataFrame, *, log_scale: bool = False, title: str | None = None, figsize=None
) -> Figure:
    """Training and validation loss against the epoch, side by side on one scale, a line per rank.

    Dashed in the rank's colour: its floor. A rank trained with several seeds has a band of a standard error to each
    side of its mean. Lines of ranks that did not finish are dotted and marked.

    Args:
        curves: columns epoch, train_loss, val_loss, rank and, with several seeds, seed.
        summary: columns rank, num_seeds and, where there is a floor, loss_floor.
        log_scale: logarithmic loss axis.
        title: above both panels.
        figsize: (width, height) in inches.
    """
    figure = Figure(figsize=figsize or (12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = rank_colors(summary["rank"])
    failed = set(summary["rank"][summary["num_seeds"] == 0])
    floors = summary.set_index("rank")["loss_floor"].astype(float).dropna()
    ends = {axes: [] for axes in panels}
    for axes, column, name in zip(panels, ("train_loss", "val_loss"), ("Training", "Validation")):
        for rank, run in curves.groupby("rank"):
            band = run[np.isfinite(run[column])].groupby("epoch")[column].agg(["mean", "sem"])
            if band.empty:
                continue
            style = {"color": colors[rank], "linewidth": 1.8, "marker": "o" if len(band) == 1 else None}
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
        axes.set_xlim(_padded(curves["epoch"].min(), curves["epoch"].max()))
    if log_scale and len(floors):
        _limit_log_axis(panels[0], curves[["train_loss", "val_loss"]].to_numpy(), floors.to_numpy())
    for axes in panels:
        _finish_axes(axes, log_scale)
    hidden = [str(rank) for rank, floor in floors.items() if log_scale and floor < panels[0].get_ylim()[0]]
    if len(floors):
        panels[1].plot([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=1.0, label="floor of each rank")
        title_of_legend = f"floor below the axis: rank {', '.join(hidden)}" if hidden else None
        panels[1].legend(loc="best", framealpha=0.85, edgecolor="none", title=title_of_legend, title_fontsize=9)
    for axes in panels:
        _label_ends(axes, ends[axes], "rank")
    panels[0].set_ylabel(LOSS_LABEL)
    panels[1].tick_params(labelleft=True)
    if title:
        figure.suptitle(title)
    return figure


def final_losses(summary: pd.DataFrame, *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Bars of the final training and validation loss of every rank, a tick at its floor.

    A rank without a loss shows its status instead; whiskers are standard errors over seeds.

    Args:
        summary: columns of `ks.results.SUMMARY_COLUMNS`.
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
    heights = {}
    for split, shift, alpha in (("train", -0.2, 0.45), ("val", 0.2, 1.0)):
        heights[split] = summary[f"final_{split}_loss"].to_numpy(float)
        errors = summary[f"final_{split}_loss_se"].to_numpy(float)
        shown = errors if np.isfinite(errors).any() else None
        axes.bar(positions + shift, heights[split], 0.38, color=fills, alpha=alpha, yerr=shown, ecolor=GREY, capsize=3)
    floors = summary["loss_floor"].to_numpy(float)
    if log_scale:
        _limit_log_axis(axes, np.append(heights["train"], heights["val"]), floors)
    _finish_axes(axes, log_scale)
    _add_headroom(axes, 0.12)
    axes.hlines(floors, positions - 0.44, positions + 0.44, color="black", linewidth=2.0)
    for position, row in summary.iterrows():
        if np.isfinite(heights["val"][position]):
            text, style = f"{heights['val'][position]:.3g}", {"textcoords": "offset points", "fontsize": 8}
            axes.annotate(text, (position + 0.2, heights["val"][position]), (0, 3), ha="center", **style)
        else:
            style = {"rotation": 90, "color": "firebrick", "fontsize": 9, "ha": "center", "va": "bottom"}
            axes.annotate(str(row["status"]), (position, 0.02), xycoords=("data", "axes fraction"), **style)
    axes.set_xticks(positions, [str(rank) for rank in summary["rank"]])
    axes.set_xlim(-0.6, len(summary) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("rank")
    axes.set_ylabel(f"final {LOSS_LABEL}")
    axes.set_title(title or "Final loss by rank", loc="left", fontsize="medium")
    handles = [Patch(color=GREY, alpha=0.45, label="training"), Patch(color=GREY, label="validation (numbers)")]
    if np.isfinite(floors).any():
        handles.append(Line2D([], [], color="black", linewidth=2.0, label="floor"))
    axes.legend(handles=handles, frameon=False, ncols=3, loc="upper right")
    return figure


def floor_curve(
    floor: pd.DataFrame, summary: pd.DataFrame, *, log_scale: bool = False, title: str | None = None, figsize=None
) -> Figure:
    """The floor of every rank against its parameters, the trained ranks on it, low-rank at equal parameters beside it.

    Args:
        floor: columns of `ks.results.FLOOR_COLUMNS`; the chain's own rows, and those of 'lowrank'.
        summary: columns of `ks.results.SUMMARY_COLUMNS`.
        log_scale: logarithmic loss axis.
        title: of the figure.
        figsize: (width, height) in inches.
    """
    figure = Figure(figsize=figsize or (8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    own = [name for name in floor["chain"].unique() if name != "lowrank"] or ["lowrank"]
    trained = summary[summary["relative_loss"].notna()]
    dense = float((summary["parameters"] * summary["compression_ratio"]).iloc[0])
    for name, group in floor.groupby("chain", sort=False):
        style = {"color": "black", "linewidth": 1.6} if name in own else {"color": GREY, "linestyle": (0, (4, 3))}
        label = f"{name}: floor of every rank" if name in own else "low-rank at equal parameters"
        axes.plot(group["parameters"], _above_zero(group["relative_loss"], log_scale), label=label, **style)
    axes.axhline(1.0, color="0.6", linewidth=1.0)
    axes.axvline(dense, color="0.6", linewidth=1.0)
    colors = rank_colors(summary["rank"])
    for parameters, group in trained.groupby("parameters"):
        color = colors[group["rank"].iloc[0]]  # ranks above saturation are one point
        axes.plot(group["parameters"], group["relative_loss"], "o", markersize=9, color=color, markeredgecolor="white")
        place = {"textcoords": "offset points", "fontsize": 9, "fontweight": "bold", "color": color}
        axes.annotate(", ".join(map(str, group["rank"])), (parameters, group["relative_loss"].max()), (6, 6), **place)
    axes.set_xscale("log")
    axes.set_xlim(floor["parameters"].min() / 1.3, max(dense * 1.5, trained["parameters"].max() * 1.3))
    if log_scale:
        floors = (summary["loss_floor"] / summary["population_loss"] * summary["relative_loss"]).to_numpy(float)
        _limit_log_axis(axes, np.append(trained["relative_loss"].to_numpy(float), 1.0), floors)
    _finish_axes(axes, log_scale)
    _add_headroom(axes, 0.04)
    axes.annotate("predicting 0", (0.01, 1.0), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  color=GREY, fontsize=9)  # fmt: skip
    axes.annotate("dense", (dense, 0.97), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                  color=GREY, fontsize=9)  # fmt: skip
    _finish_parameter_axis(axes)
    axes.set_title(title or "Floor by parameters", loc="left", fontsize="medium")
    handles, _ = axes.get_legend_handles_labels()
    if len(trained):
        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", label="trained (number: rank)"))
    axes.legend(handles=handles, frameon=False, loc="lower left" if not log_scale else "best")
    return figure


def study_figures(
    study: Study, *, log_scale: bool = False, title: str | None = None, figsize=None
) -> dict[str, Figure]:
    """Every figure that a study has the data for, by the name that its file carries."""
    look = {"log_scale": log_scale, "title": title or study.title, "figsize": figsize}
    figures = {}
    if len(study.curves):
        figures["loss_curves"] = loss_curves(study.curves, study.summary, **look)
    figures["final_losses"] = final_losses(study.summary, **look)
    if len(study.floor) and study.summary["relative_loss"].notna().any():
        figures["floor"] = floor_curve(study.floor, study.summary, **look)
    return figures


def chains(studies: list[Study], *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Several studies in one figure: loss against parameters, floors as lines, trained ranks as points.

    Args:
        studies: with relative losses and parameters, that is not of the 2025 scripts.
        log_scale: logarithmic loss axis.
        title: of the figure.
        figsize: (width, height) in inches.
    Raises:
        ValueError: a study without them.
    """
    figure = Figure(figsize=figsize or (9, 5.5), layout="constrained")
    axes = figure.subplots()
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")  # Okabe and Ito
    markers = "osD^vP*X"
    losses, ends = [1.0], []
    for index, study in enumerate(studies):
        trained = study.summary[study.summary["relative_loss"].notna()].sort_values("parameters")
        if trained.empty:
            raise ValueError(
                f"{study.name} has no relative losses and parameters; only studies of this toolkit compare"
            )
        look = {"color": palette[index % len(palette)], "marker": markers[index % len(markers)]}
        own = study.floor[study.floor["chain"] == (study.chain or "").split(" ")[0]]
        line = {"color": look["color"], "linewidth": 1.2, "alpha": 0.7}
        axes.plot(own["parameters"], _above_zero(own["relative_loss"], log_scale), **line)
        label = f"{study.name}: {study.chain}"
        axes.plot(trained["parameters"], trained["relative_loss"], linestyle="", markersize=8, label=label, **look)
        losses += list(trained["relative_loss"])
        ends += list(trained["parameters"])
        for _, row in trained.iterrows():
            place = {"textcoords": "offset points", "fontsize": 8, "color": look["color"]}
            axes.annotate(f"{row['rank']}", (row["parameters"], row["relative_loss"]), (5, 5), **place)
    axes.set_xscale("log")
    axes.set_xlim(min(ends) / 1.5, max(ends) * 1.5)
    if log_scale:
        _limit_log_axis(axes, np.array(losses), np.empty(0))
    _finish_axes(axes, log_scale)
    _finish_parameter_axis(axes)
    axes.set_title(
        title or "Chains side by side (points: trained, number: rank; lines: floors)", loc="left", fontsize="medium"
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


def _finish_parameter_axis(axes: Axes) -> None:
    """Labels of a logarithmic axis of parameters, and of the relative loss against it."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(_count))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters")
    axes.set_ylabel(RELATIVE_LABEL)


def _count(value: float, _position=None) -> str:
    """12000 → 12k."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"


def _limit_log_axis(axes: Axes, losses: np.ndarray, floors: np.ndarray) -> None:
    """Show the losses and the floors less than 100 times below them; one near zero would stretch the axis."""
    positive = losses[np.isfinite(losses) & (losses > 0)]
    if len(positive):
        low, high = positive.min(), positive.max()
        low = min([low, *floors[floors > low / 100]])
        margin = max(1.25, (high / low) ** 0.06)
        axes.set_ylim(low / margin, high * margin)


def _above_zero(losses: pd.Series, log_scale: bool) -> pd.Series:
    """Losses for a line; on a log axis a zero becomes tiny, so that the line leaves the axis at its foot."""
    return losses.clip(lower=1e-12) if log_scale else losses


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


def _label_ends(axes: Axes, ends: list, heading: str) -> None:
    """Write each label at the end of its line, pushed apart where lines end close together."""
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
    place = {"xycoords": "axes fraction", "color": GREY, "fontsize": 9, "va": "center"}
    axes.annotate(heading, (1.02, max(heights) + 1.4 * gap), **place)
