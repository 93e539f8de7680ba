"""Axes that a reader can read: ticks, limits, grids, labels at the ends of lines."""

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

from ks.errors import one_line

GREY = "0.35"
RELATIVE_LABEL = "share of the output energy lost"


def literal(text: object) -> str:
    """Return a text for matplotlib that is drawn as it is, in one line: a `$` starts no formula."""
    return literal_lines([one_line(text, 300)])


def literal_lines(lines: list[str]) -> str:
    """Return lines for matplotlib that are drawn as they are."""
    return "\n".join(lines).replace("$", r"\$")


def heading(text: str, figure: Figure) -> str:
    """Return a title for matplotlib, in as many lines as the width of the figure needs, and drawn as it is."""
    characters = max(20, int(10 * figure.get_figwidth()))  # ten an inch, a little wider than the font needs
    return literal_lines(textwrap.wrap(one_line(text, 300), characters))


def finish_parameter_axis(axes: Axes) -> None:
    """Label a logarithmic axis of parameters, and the axis of the relative loss against it."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(_count))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters")
    axes.set_ylabel(RELATIVE_LABEL)


def _count(value: float, _position=None) -> str:
    """Format a number with a suffix: 12000 → 12k."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"


def set_log_limits(axes: Axes, low: float, high: float) -> None:
    """Limit a logarithmic axis to at most 100 decades that end at 1e290: matplotlib's ticks go beyond its limits."""
    high = min(high, 1e290)
    axes.set_ylim(max(low, high * 1e-100, 1e-305), high)


def limit_log_axis(axes: Axes, losses: np.ndarray, floors: np.ndarray) -> None:
    """Limit an axis to the losses and to floors less than 100 times below them; one near zero would stretch it."""
    positive = losses[np.isfinite(losses) & (losses > 0)]
    if len(positive):
        low, high = positive.min(), positive.max()
        low = min([low, *floors[floors > low / 100]])
        margin = 10 ** max(0.1, 0.06 * (np.log10(high) - np.log10(low)))
        set_log_limits(axes, low / margin, high * margin)


def above_zero(losses: pd.Series, log_scale: bool) -> pd.Series:
    """Return the losses of a line; on a log axis a zero becomes tiny, so that the line leaves the axis at its foot."""
    return losses.clip(lower=1e-12) if log_scale else losses


def add_headroom(axes: Axes, share: float) -> None:
    """Lengthen the loss axis upwards by a share of its length, for labels and legend above the bars."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        set_log_limits(axes, low, high * 10 ** (share * (np.log10(high) - np.log10(low))))
    else:
        axes.set_ylim(low, high + (high - low) * share)


def padded(low: float, high: float) -> tuple[float, float]:
    """Return limits a little wider than the data, or of width one for a single value."""
    margin = 0.02 * (high - low) or 0.5
    return low - margin, high + margin


def finish_axes(axes: Axes, log_scale: bool) -> None:
    """Set grid and spines; on a log axis of few decades, label ticks within a decade too."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if not log_scale:
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    widen = max(0.0, 0.5 - (np.log10(high) - np.log10(low))) / 2
    set_log_limits(axes, low * 10**-widen, high * 10**widen)
    low, high = axes.get_ylim()
    decades = np.log10(high) - np.log10(low)
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(np.arange(1.0, 10.0))
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if decades <= 3:
        formatter = ScalarFormatter()
        formatter.set_scientific(not 1e-6 < low < high < 1e9)
        axes.yaxis.set_major_formatter(formatter)


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
    place: dict[str, Any] = {"xycoords": "axes fraction", "color": GREY, "fontsize": 9, "va": "center"}
    axes.annotate(heading, (1.02, max(heights) + 1.4 * gap), **place)
