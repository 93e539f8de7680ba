"""The increases of the loss of a model that its plans predict, against those that were measured."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ks.model.model_plan import ModelPlan
from ks.model.prediction import measured_over_predicted
from ks.report.figures import parts
from ks.report.figures.parts import FAMILY_COLORS, GREY, paper
from ks.report.words import Words

# Of the points of `points_of`: marker, colour, label, and the place of the fraction beside it.
LOOKS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "plan": ("o", FAMILY_COLORS[0], "plan (number: fraction of the parameters)", {"xytext": (-8, 3), "ha": "right"}),
    "uniform": ("s", FAMILY_COLORS[1], "the same fraction in every layer", {"xytext": (8, -9)}),
}
MISJUDGED = "firebrick"


def points_of(plan: ModelPlan) -> dict[str, tuple[float, float]]:
    """Return the predicted and the measured increase of a plan and of its uniform one, where both are above 0."""
    return {name: point for name, point in plan.increases().items() if min(point) > 0}


def measured_by_predicted(figure: Figure, plans: Sequence[ModelPlan], log_scale: bool) -> str:
    """Draw measured against predicted increases; a line joins every plan with equal fractions of the same budget.

    Increases span decades, so both axes are logarithmic whatever `log_scale` is.

    Args:
        figure: empty.
        plans: of one model and loss, each with a point.
    """
    del log_scale
    (axes,) = parts.make_panels(figure, height=parts.PANEL_WIDTH)
    parts.draw_grid(axes)
    points = [points_of(plan) for plan in plans]
    pairs = [pair for found in points for pair in found.values()]
    ends = low, high = min(map(min, pairs)) / 1.4, max(map(max, pairs)) * 1.4
    for axis in (axes.xaxis, axes.yaxis):
        parts.set_log_axis(axis, low, high, "{:g}".format)
    factor = measured_over_predicted(pairs)
    line: dict[str, Any] = {"color": GREY, "linewidth": 1.0, "zorder": 1}
    axes.plot(ends, ends, label="measured = predicted", **line)
    axes.plot(ends, [factor * end for end in ends], ":", label=f"measured = {factor:.2g} × predicted", **line)
    for plan, found in zip(plans, points):
        look: dict[str, Any] = {"color": GREY, "linewidth": 0.8}
        if plan.is_misjudged:
            look = {"color": MISJUDGED, "linewidth": 2.0}
        axes.plot(*zip(*found.values()), zorder=2, **look)
    for name, (marker, color, label, place) in LOOKS.items():
        shown = [(plan, found[name]) for plan, found in zip(plans, points) if name in found]
        look = {"linestyle": "", "markersize": 8, "markeredgecolor": paper(), "zorder": 4, "label": label}
        axes.plot(*zip(*(point for _, point in shown)), marker=marker, color=color, **look)
        for plan, point in shown:
            axes.annotate(f"{plan.share:.0%}", point, color=color, **place, **parts.BESIDE)
    unit = Words(unit=plans[0].unit).axis_unit
    axes.set_xlabel(f"predicted loss increase ({unit})")
    axes.set_ylabel(f"measured loss increase ({unit})")
    parts.write_legend(figure, axes.get_legend_handles_labels()[0])
    if wrong := [f"{plan.share:.0%}" for plan in plans if plan.is_misjudged]:
        return (
            f"WARNING: with {' and '.join(wrong)} of the parameters, the plan is predicted to cost less than equal "
            "fractions, and was measured to cost more"
        )
    ratios = [measured / predicted for predicted, measured in pairs]
    return f"the measured increase is {min(ratios):.2g} to {max(ratios):.2g} times the predicted one"
