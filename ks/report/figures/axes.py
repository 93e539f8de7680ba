"""Axes that a reader can read: ticks at both ends, limits, percent, reference lines, headings, labels of lines."""

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ks.errors import one_line
from ks.report.figures.units import Units

GREY = "0.35"
NOTE: dict[str, Any] = {"color": GREY, "fontsize": 8}
MOST_TICKS = 9
PANEL_WIDTH, PANEL_HEIGHT = 3.0, 2.7  # least inches of a panel among several
# Matplotlib's arithmetic on logarithmic axes overflows near the ends of float64.
SMALLEST, LARGEST = 1e-290, 1e290


def literal(text: object) -> str:
    """Return a text for matplotlib that is drawn as it is, in one line: a `$` starts no formula."""
    return one_line(text, 300).replace("$", r"\$")


def wrapped(text: str, inches: float, font: FontProperties) -> str:
    """Return a text for matplotlib, drawn as it is, in as many lines as the width needs; long words are broken.

    Args:
        text: of one line.
        inches: width of the lines.
        font: of the text.
    """

    def fits(line: str) -> bool:
        width = TextToPath().get_text_width_height_descent(line, font, False)[0]
        return width <= 0.94 * 72 * inches  # hinting makes text up to 5% wider at low resolutions

    lines: list[str] = []
    line = ""
    for word in one_line(text, 300).split():
        if line and not fits(f"{line} {word}"):
            lines, line = [*lines, line], ""
        line = f"{line} {word}".strip()
        while not fits(line) and len(line) > 1:
            length = max(1, bisect.bisect_left(range(1, len(line)), True, key=lambda end: not fits(line[:end])))
            lines, line = [*lines, line[:length]], line[length:]
    return "\n".join([*lines, line]).replace("$", r"\$")


def write_heading(figure: Figure, finding: str, name: str | None) -> None:
    """Write the finding of a figure in bold and the name of the study below it, above everything else in the figure."""
    width, height = figure.get_size_inches()
    top = height - 0.08
    for text, font, color in (
        (finding[:1].upper() + finding[1:], FontProperties(size=11, weight="bold"), "black"),
        (name, FontProperties(size=9), GREY),
    ):
        if text:
            lines = wrapped(text, width - 0.2, font)
            place = (0.1 / width, top / height)
            figure.text(*place, lines, fontproperties=font, color=color, va="top", ha="left", linespacing=1.2)
            top -= (lines.count("\n") + 1) * 1.35 * font.get_size_in_points() / 72
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, max(0.3, (top - 0.04) / height)))


def make_panels(figure: Figure, count: int) -> list[Axes]:
    """Return panels with one loss axis, side by side, or one above the other in a figure that is made high enough.

    Args:
        figure: without axes.
        count: of panels.
    """
    beside = figure.get_figwidth() >= PANEL_WIDTH * count
    if not beside:
        figure.set_figheight(max(figure.get_figheight(), PANEL_HEIGHT * count + 1.0))
    return [*figure.subplots(*((1, count) if beside else (count, 1)), sharey=True, squeeze=False).ravel()]


def write_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Write the legend below everything else in a figure, where it hides nothing."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.068 * longest)))  # inches beside a label, and of a letter
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=8, ncols=columns)


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most nine ticks of a logarithmic axis, the first at most `low` and the last at least `high`.

    They are 1, 2 and 5 times powers of ten over few decades, and powers of ten in equal steps over many.
    """
    low, high = max(low, SMALLEST), min(max(high, SMALLEST), LARGEST)
    if high < low * 1.2:
        low, high = low / 1.2, high * 1.2
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    for factors in ((1, 2, 5), (1, 3)):
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        start = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
        stop = min(index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
        if stop - start < MOST_TICKS:
            return ticks[start : stop + 1]
    step = math.ceil((last - first) / (MOST_TICKS - 1))
    return [10.0**power for power in range(last, first - step, -step)][::-1]


def set_log_axis(axis: XAxis | YAxis, low: float, high: float, form) -> None:
    """Make an axis logarithmic, from a tick at or below `low` to one at or above `high`.

    Args:
        axis: x or y.
        low, high: of the data, positive.
        form: value → label.
    """
    ticks = log_ticks(low, high)
    set_scale, set_limits = (getattr(axis.axes, f"set_{axis.axis_name}{name}") for name in ("scale", "lim"))
    set_scale("log")
    set_limits(ticks[0], ticks[-1])
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def percent(value: float, _position=None) -> str:
    """Format a share: 0.005 → 0.5%."""
    return f"{100 * value:.6g}%"


def count(value: float, _position=None) -> str:
    """Format a number with a suffix: 12000 → 12k."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"


def draw_grid(axes: Axes) -> None:
    """Draw a light grid behind the data, and no frame above it and on its right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def finish_loss_axis(
    axes: Axes, units: Units, losses: Iterable[float], floors: Iterable[float] = (), *, log_scale: bool
) -> None:
    """Set limits, ticks and grid of a loss axis that holds all losses, the zero predictor, and dense where it can.

    Floors more than 100 times below every loss are left out of a logarithmic axis: one near zero would stretch it.

    Args:
        axes: with the loss upwards.
        units: of the losses.
        losses, floors: that are drawn.
        log_scale: logarithmic axis.
    """
    draw_grid(axes)
    values = np.array([*losses, *([1.0] if units.shares else [])], float)
    values = values[np.isfinite(values)]
    form = percent if units.shares else "{:g}".format
    if not log_scale:
        axes.set_ylim(0, 1.05 * max(values.max(initial=0.0), *floors, 1e-300))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    else:
        positive = values[values > 0] if (values > 0).any() else np.array([1.0])
        low = positive.min()
        least = min([low, *(floor for floor in floors if floor > low / 100)])
        set_log_axis(axes.yaxis, least / 1.25, positive.max() / 1.03, form)  # with room for a note below the least one
    if units.shares:
        axes.axhline(1.0, color="0.6", linewidth=1.0, zorder=1)


def note_references(axes: Axes, *, log_scale: bool) -> None:
    """Name the zero predictor, at its loss, and dense, which loses nothing, beside the axis of the loss."""
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", **NOTE}
    axes.annotate("predicting 0", (0.99, 1.0), (0, 2), xycoords=("axes fraction", "data"), **place)
    text, offset = ("dense ↓", (-16, -13)) if log_scale else ("dense", (-10, 8))
    axes.annotate(text, (0.0, 0.0), offset, xycoords="axes fraction", **place)


def add_squared_axis(axes: Axes, units: Units) -> None:
    """Add an axis on the right with the losses in squared units of the outputs, if the other has shares."""
    if not units.shares:
        return
    right = axes.twinx()
    right.set_yscale(axes.get_yscale())
    low, high = axes.get_ylim()
    right.set_ylim(low * units.train, high * units.train)
    right.spines[["top", "right"]].set_visible(False)
    right.tick_params(labelsize=8, colors=GREY)
    ticks = [tick * units.train for tick in axes.get_yticks() if low <= tick <= high]
    right.yaxis.set_major_locator(FixedLocator(ticks))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    right.set_ylabel(literal(units.squared_label), **NOTE)


def mark_ranks(axes: Axes, ranks: pd.Series, at: pd.Series, losses: pd.Series, colors: dict[int, tuple]) -> None:
    """Draw a point with its rank beside it for every rank."""
    place: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "fontweight": "bold", "zorder": 5}
    look: dict[str, Any] = {"markersize": 8, "markeredgecolor": "white", "clip_on": False, "zorder": 4}
    for rank, x, y in zip(ranks, at, losses):
        axes.plot(x, y, "o", color=colors[rank], **look)
        axes.annotate(f"{rank}", (x, y), (6, 5), color=colors[rank], **place)


def above_zero(losses: pd.Series, log_scale: bool) -> pd.Series:
    """Return the losses of a line; on a log axis a zero becomes tiny, so that the line leaves the axis at its foot."""
    return losses.clip(lower=1e-12) if log_scale else losses


def padded(low: float, high: float) -> tuple[float, float]:
    """Return limits a little wider than the data, or of width one for a single value."""
    margin = 0.02 * (high - low) or 0.5
    return low - margin, high + margin


def finish_epoch_axis(axes: Axes, epochs: pd.Series) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(padded(epochs.min(), epochs.max()))


def label_ends(axes: Axes, ends: list, heading: str) -> None:
    """Write each label at the end of its line; labels of lines that end close together are moved apart."""
    if not ends:
        return

    def height_of(x, y):
        return axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]

    points = sorted((height_of(x, y), x, y, label, color) for x, y, label, color in ends)
    height_points = axes.bbox.height * 72 / axes.figure.dpi
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
    axes.annotate(heading, (1.02, max(heights) + 1.4 * gap), xycoords="axes fraction", va="center", **NOTE)
