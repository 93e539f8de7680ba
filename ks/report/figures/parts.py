"""Parts of figures: colours, ticks, limits, reference lines, headings, labels; the rest is matplotlib's style."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rcParams
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ks.errors import one_line
from ks.report.read_results import MEAN_SQUARED_ERROR, Units

GREY = "0.5"  # legible on white and on black
# Okabe and Ito, without yellow and black, which white and black paper swallow.
FAMILY_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"
RANK_MAP = "plasma"
LIGHTEST = 0.66  # of the colour map on white; lighter lines have a contrast below 3 : 1
NOTE: dict[str, Any] = {"color": GREY, "fontsize": "small"}
BESIDE: dict[str, Any] = {"textcoords": "offset points", "fontsize": "small", "fontweight": "bold"}  # of a point
PANEL_WIDTH, PANEL_HEIGHT = 5.2, 3.5  # inches with its labels; in this width, text is legible on a phone
PAD = 0.05  # inches around a panel
LETTER = 0.62  # width of a letter of a heading, as a fraction of the size of its font
# Matplotlib's arithmetic on logarithmic axes overflows near the ends of float64.
SMALLEST, LARGEST = 1e-200, 1e200

count = EngFormatter(sep="")  # 12000 → 12k


def ink() -> str:
    """Return the colour of texts in the style in use."""
    return rcParams["text.color"]


def paper() -> str:
    """Return the colour behind the data in the style in use."""
    return rcParams["axes.facecolor"]


def rank_colors(ranks) -> dict[int, tuple]:
    """Return a colour for each rank, from dark to light: readers who see no colour see the order."""
    ranks = sorted(ranks)
    start = 0.0 if sum(to_rgb(paper())) > 1.5 else 1.0 - LIGHTEST
    positions = start + (np.linspace(0.0, LIGHTEST, len(ranks)) if len(ranks) > 1 else np.array([0.3]))
    return {rank: colormaps[RANK_MAP](position) for rank, position in zip(ranks, positions)}


def literal(text: object) -> str:
    """Return a text for matplotlib that is drawn as it is, in one line: a `$` starts no formula."""
    return one_line(text, 300).replace("$", r"\$")


class Sheet(Figure):
    """Panels of one size beside each other, with a heading above and a legend below.

    The places are computed once, so that all its files and the report show the same picture.

    finding: the heading. above, below: inches that heading and legend take, known once it is arranged.
    """

    finding, above, below = "", 0.0, 0.0

    def arrange(self, finding: str, name: str | None) -> None:
        """Write the finding in bold and the name of the study below it, and give all that is drawn its place."""
        self.finding = finding[:1].upper() + finding[1:]
        width, panel = self.get_size_inches()
        written, top = [], 0.08
        looks = ((self.finding, 1.1, "bold", ink()), (name or "", 0.9, rcParams["font.weight"], GREY))
        for text, scale, weight, color in looks:
            size = scale * rcParams["font.size"]
            wrapped = textwrap.wrap(one_line(text, 300), int((width - 0.2) * 72 / (LETTER * size)))
            shown = "\n".join(wrapped).replace("$", r"\$")
            look: dict[str, Any] = {"va": "top", "ha": "left", "linespacing": 1.2, "fontsize": size}
            written.append((self.text(0.1 / width, 1.0, shown, weight=weight, color=color, **look), top))
            top += len(wrapped) * 1.35 * size / 72
        renderer, dpi = FigureCanvasAgg(self).get_renderer(), self.dpi
        legends = [legend.get_window_extent(renderer).height for legend in self.legends]
        self.above, self.below = top, sum(legends) / dpi
        height = self.above + panel + self.below
        reach = np.zeros(4)  # of the labels beyond the axes: left, below, right and above
        for axes in self.axes:
            box = axes.get_tightbbox(renderer, bbox_extra_artists=[*axes.texts, *axes.child_axes])
            assert box is not None  # it is visible
            reach = np.maximum(reach, np.subtract(axes.bbox.extents, box.extents) * (1, 1, -1, -1))
        left, bottom, right, above = reach / dpi + PAD
        self.set_figheight(height)
        size = ((PANEL_WIDTH - left - right) / width, (panel - bottom - above) / height)
        for index, axes in enumerate(self.axes):
            axes.set_position(((index * PANEL_WIDTH + left) / width, (self.below + bottom) / height, *size))
        for line, down in written:
            line.set_y(1 - down / height)

    def parts(self) -> list[str]:
        """Return the places of the panels and of the legend: left, top, width and height in points, as SVG has them."""
        width, height = self.get_size_inches()
        lefts = np.arange(0, width - 0.1, PANEL_WIDTH)
        boxes = [(left, self.above, PANEL_WIDTH, height - self.above - self.below) for left in lefts]
        boxes.append(((width - PANEL_WIDTH) / 2, height - self.below, PANEL_WIDTH, self.below))
        return [" ".join(f"{72 * inches:.1f}" for inches in box) for box in boxes if box[-1] > 0]


def make_panels(figure: Figure, count: int = 1, height: float = PANEL_HEIGHT) -> list[Axes]:
    """Return panels with one loss axis, side by side; the height is in inches."""
    figure.set_size_inches(PANEL_WIDTH * count, height)
    panels: list[Axes] = []
    for index in range(count):
        place = ((index + 0.16) / count, 0.15, 0.72 / count, 0.75)  # close to that of `Sheet.arrange`
        panels.append(figure.add_axes(place, sharey=panels[0] if panels else None))
    return panels


def write_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Write the legend below everything else in a figure, where it hides nothing."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(PANEL_WIDTH / (0.6 + 0.068 * longest)))  # inches beside a label, and of a letter
    look: dict[str, Any] = {"frameon": False, "fontsize": "small", "borderaxespad": 0.0}
    figure.legend(handles=handles, loc="lower center", ncols=columns, **look)


def set_log_axis(axis: XAxis | YAxis, low: float, high: float, form) -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5 times powers of ten, or at these alone over many decades.

    Args:
        axis: x or y.
        low, high: its ends.
        form: value → label.
    """
    low = max(low, SMALLEST)
    high = min(max(high, 1.2 * low), LARGEST)
    set_scale, set_limits = (getattr(axis.axes, f"set_{axis.axis_name}{name}") for name in ("scale", "lim"))
    set_scale("log")
    set_limits(low, high)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def draw_grid(axes: Axes) -> None:
    """Draw a light grid behind the data, and no frame above it and on its right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.4)
    axes.set_axisbelow(True)


def finish_loss_axis(
    axes: Axes, units: Units, losses: Iterable[float], floors: Iterable[float] = (), *, log_scale: bool
) -> None:
    """Set limits, ticks, label and grid of an upward loss axis, and mark the zero predictor and dense beside it.

    It holds all losses. Floors more than 100 times below every loss are left out of a logarithmic axis: one near zero
    would stretch it.
    """
    draw_grid(axes)
    values = np.array([*losses, units.zero], float)
    values = values[np.isfinite(values)]
    form = (lambda value: f"{100 * value:.6g}%") if units.fractions else "{:g}".format
    if not log_scale:
        axes.set_ylim(0, 1.05 * max(values.max(initial=0.0), *floors, 1e-300))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    else:
        positive = values[values > 0] if (values > 0).any() else np.array([1.0])
        low = positive.min()
        least = min([low, *(floor for floor in floors if floor > low / 100)])
        set_log_axis(axes.yaxis, least / 1.5, 1.02 * positive.max(), form)  # with room for a note below the least one
    axes.set_ylabel(literal(units.label))
    if not units.relative:
        return
    axes.axhline(units.zero, color=GREY, linewidth=1.0, zorder=1)
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", **NOTE}
    axes.annotate("zero predictor", (0.99, units.zero), (0, 2), xycoords=("axes fraction", "data"), **place)
    text, offset = ("dense ↓", (-16, -13)) if log_scale else ("dense", (-10, 8))
    axes.annotate(text, (0.0, 0.0), offset, xycoords="axes fraction", **place)


def add_squared_axis(axes: Axes, units: Units) -> None:
    """Add an axis on the right with the losses in squared units of the outputs, if the other one has fractions."""
    if not units.fractions:
        return

    functions = (lambda loss: loss * units.train, lambda loss: loss / units.train)
    right = axes.secondary_yaxis("right", functions=functions)
    if axes.get_yscale() == "log":
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter("{x:.2g}")
    right.spines[["right"]].set_visible(False)
    right.tick_params(labelsize="small", colors=GREY)
    right.set_ylabel(MEAN_SQUARED_ERROR, **NOTE)


def floor_label(family: str, quick: bool) -> str:
    """Return the label of the line of a family's floors; where bounds differ, the line is only a quick lower bound."""
    return literal(f"{family}: {'quick lower bound' if quick else 'floor'} of every rank")


def mark_dense(axes: Axes, at: float, text: str) -> None:
    """Draw a vertical line where dense is on the final x axis, with a text along its right side, above what is there.

    Losses fall to the right. The text is on the left where the axis ends at the line.
    """
    axes.axvline(at, color=GREY, linewidth=1.0, zorder=1)
    side = 1 if axes.get_xlim()[1] >= 1.15 * at else -1
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    axes.annotate(text, (at, 0.88), (2 * side, 0), ha="left" if side > 0 else "right", rotation=90, **place, **NOTE)


def mark_ranks(axes: Axes, ranks: pd.Series, at: pd.Series, losses: pd.Series, colors: dict[int, tuple]) -> None:
    """Draw a point with its rank beside it for every rank."""
    points = [colors[rank] for rank in ranks]
    axes.scatter(at, losses, 64, color=points, edgecolors=paper(), linewidths=1.0, clip_on=False, zorder=4)
    for rank, x, y in zip(ranks, at, losses):
        axes.annotate(f"{rank}", (x, y), (6, 5), color=colors[rank], zorder=5, **BESIDE)


def label_ends(axes: Axes, ends: list) -> None:
    """Write the ranks of lines at their ends; those of lines that end close together are moved apart.

    Args:
        axes: with final limits.
        ends: x, y, label and color of the end of each line.
    """
    if not ends:
        return
    axes.get_ylim()  # brings both limits up to date
    least = SMALLEST if axes.get_yscale() == "log" else -np.inf
    points = axes.transData.transform([(x, max(y, least)) for x, y, *_ in ends])
    places = np.clip(axes.transAxes.inverted().transform(points), 0, 1)
    heights = places[:, 1]
    order = np.argsort(heights, kind="stable")
    steps = np.arange(len(ends)) * min(0.13 / (axes.bbox.height / axes.figure.dpi), 1 / len(ends))  # inches of a line
    apart = np.maximum.accumulate(heights[order] - steps) + steps
    apart = np.minimum(apart, 1 - steps[::-1])
    look: dict[str, Any] = {"fontsize": "small", "fontweight": "bold", "va": "center", "transform": axes.transAxes}
    for index, height in zip(order, apart):
        axes.text(1.02, height, ends[index][2], color=ends[index][3], **look)
    lines = [(places[index], (1.02, height)) for index, height in zip(order, apart)]
    colors = [ends[index][3] for index in order]
    joined = LineCollection(lines, colors=colors, linewidths=0.6, transform=axes.transAxes, clip_on=False)
    axes.add_collection(joined, autolim=False)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    axes.annotate("rank", (1.02, apart[-1]), (0, 7), **place, **NOTE)
