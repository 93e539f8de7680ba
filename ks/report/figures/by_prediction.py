"""The increases of the loss of a model that its plans predict, against those that were measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ks.model.model_plan import ModelPlan
from ks.model.prediction import measured_over_predicted
from ks.report.figures import parts
from ks.report.figures.parts import FAMILY_COLORS, GREY, paper
from ks.report.words import Words

PLANNED, EQUAL = FAMILY_COLORS[:2]
MISJUDGED = "firebrick"


@dataclass(frozen=True)
class Increase:
    """Predicted and measured increase of the loss per token, of a plan or of equal fractions in every layer.

    fraction: of the dense parameters. planned: whether the fractions of the layers are those of a plan.
    """

    fraction: float
    planned: bool
    predicted: float
    measured: float


def increases_of(plans: Sequence[ModelPlan]) -> list[Increase]:
    """Return the predicted and measured increases of plans and of their equal fractions; both are above 0."""
    found = []
    for plan in plans:
        for one in (plan, *([plan.as_uniform()] if plan.uniform else ())):
            predicted, measured = one.loss_increase or 0.0, one.measured_increase or 0.0
            if predicted > 0 and measured > 0:
                found.append(Increase(plan.share, one is plan, predicted, measured))
    return found


def _pairs(increases: Sequence[Increase]) -> list[tuple[Increase, Increase]]:
    """Return every plan with the equal fractions of the same budget."""
    equal = {one.fraction: one for one in increases if not one.planned}
    return [(one, equal[one.fraction]) for one in increases if one.planned and one.fraction in equal]


def _is_misjudged(plan: Increase, equal: Increase) -> bool:
    return plan.predicted < equal.predicted and plan.measured > equal.measured


def of_predictions(increases: Sequence[Increase]) -> str:
    """Return the plans that are worse than equal fractions against their prediction, else measured over predicted."""
    wrong = [f"{plan.fraction:.0%}" for plan, equal in _pairs(increases) if _is_misjudged(plan, equal)]
    if wrong:
        return (
            f"WARNING: with {' and '.join(wrong)} of the parameters, the plan is predicted to cost less than equal "
            "fractions, and was measured to cost more"
        )
    ratios = [one.measured / one.predicted for one in increases]
    return f"the measured increase is {min(ratios):.2g} to {max(ratios):.2g} times the predicted one"


def measured_by_predicted(figure: Figure, increases: Sequence[Increase], unit: str) -> str:
    """Draw measured against predicted increases; a line joins every plan with equal fractions of the same budget.

    Args:
        figure: empty.
        increases: one or more, above 0.
        unit: of the loss.
    """
    axes = figure.subplots()
    parts.draw_grid(axes)
    values = [value for one in increases for value in (one.predicted, one.measured)]
    low, high = min(values) / 1.4, max(values) * 1.4
    for axis in (axes.xaxis, axes.yaxis):
        parts.set_log_axis(axis, low, high, "{:g}".format)
    factor = measured_over_predicted((one.predicted, one.measured) for one in increases)
    ends = [low, high]
    line: dict[str, Any] = {"color": GREY, "linewidth": 1.0, "zorder": 1}
    axes.plot(ends, ends, label="measured = predicted", **line)
    axes.plot(ends, [factor * end for end in ends], ":", label=f"measured = {factor:.2g} × predicted", **line)
    for plan, equal in _pairs(increases):
        wrong = _is_misjudged(plan, equal)
        look: dict[str, Any] = {"color": MISJUDGED, "linewidth": 2.0} if wrong else {"color": GREY, "linewidth": 0.8}
        axes.plot([plan.predicted, equal.predicted], [plan.measured, equal.measured], zorder=2, **look)
    for planned, marker, color, label in (
        (True, "o", PLANNED, "plan (number: fraction of the parameters)"),
        (False, "s", EQUAL, "the same fraction in every layer"),
    ):
        shown = [one for one in increases if one.planned is planned]
        look = {"linestyle": "", "markersize": 8, "markeredgecolor": paper(), "zorder": 4, "label": label}
        axes.plot([one.predicted for one in shown], [one.measured for one in shown], marker, color=color, **look)
        place: dict[str, Any] = {"textcoords": "offset points", "fontsize": "small", "fontweight": "bold"}
        place |= {"xytext": (-8, 3), "ha": "right"} if planned else {"xytext": (8, -9)}
        for one in shown:
            axes.annotate(f"{one.fraction:.0%}", (one.predicted, one.measured), color=color, **place)
    per_token = Words(unit=unit).per_token
    axes.set_xlabel(f"predicted loss increase ({per_token})")
    axes.set_ylabel(f"measured loss increase ({per_token})")
    parts.write_legend(figure, axes.get_legend_handles_labels()[0])
    return of_predictions(increases)
