"""The verdict on a rank: whether it has converged to its floor, else what limits it. All rules are here.

It is a text, as in the files: the `Limit` of the rank if it has a floor, then its marks, separated by commas.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from ks.bounds.floors import Floor
from ks.errors import InternalError

# A relative loss below this is zero for practical purposes: no ratio to it is reported.
NEGLIGIBLE_FLOOR = 1e-6
# Rounding of float32 factors and of the floor, relative to the zero predictor and to the floor.
ROUNDING = 1e-9
# A rank has converged if its excess is at most 1% of the smaller of its floor and of the loss that its rank can remove
# (1 − floor): to be within 1% of a floor near 1 means nothing.
CONVERGED_FRACTION = 0.01
# A larger excess of the relative loss that is at most this may be many times a small floor, but little can be gained.
SMALL_EXCESS = 0.001
# If the loss on held-out inputs is larger by this fraction, too few inputs were measured.
CALIBRATION_EXCESS = 0.05
# Samples are the limit if the training loss shows less than half of the gap to the floor.
SEEN_FRACTION = 0.5


class Limit(StrEnum):
    """The limit of a trained rank; the value is the word in the files."""

    CONVERGED = "converged"
    BRACKETED = "between its bounds"
    SMALL = "within 0.1% of the energy"
    SMALL_INCREASE = "within 0.1% of the zero predictor's loss"  # the same under the loss of the model
    SAMPLES = "sample-limited"
    TRAINING = "undertrained"


class Mark(StrEnum):
    """A property of a rank that its verdict lists after the limit."""

    SATURATED = "saturated"
    LARGER_THAN_DENSE = "larger than dense"
    BETTER = "better than the best known chain"
    CALIBRATION_LIMITED = "calibration-limited"


def parts_of(row: Mapping[str, Any]) -> list[str]:
    """Return the limit and the marks in the verdict of a row of the summary."""
    return row["verdict"].split(", ") if row["verdict"] else []


def limit_of(population_loss: float, train_loss: float, floor: Floor, small: Limit = Limit.SMALL) -> Limit:
    """Return the limit of a rank; all losses are relative.

    converged: above the floor by at most 1% of the smaller of the floor and of the loss that the rank can remove.
    between its bounds: the same holds for the upper bound of the floor, but not for the lower one.
    within 0.1% of the energy (or `small`): neither, and above the upper bound by at most 0.1% of the zero predictor's.
    sample-limited: none of these, and the training loss shows less than half of the gap to the upper bound.
    undertrained: none of these.
    """
    if population_loss <= converged_loss(floor.lower):
        return Limit.CONVERGED
    if population_loss <= converged_loss(floor.upper):
        return Limit.BRACKETED
    gap = population_loss - floor.upper
    if gap <= SMALL_EXCESS:
        return small
    return Limit.SAMPLES if train_loss - floor.upper < SEEN_FRACTION * gap else Limit.TRAINING


def converged_loss(floor: float) -> float:
    """Return the largest loss that counts as at a floor; both are relative."""
    return floor + max(CONVERGED_FRACTION * min(floor, 1 - floor), NEGLIGIBLE_FLOOR)


def is_calibration_limited(relative: float, held_out_relative: float, held_out_count: int) -> bool:
    """Return whether the loss on held-out inputs is so much larger that more measured inputs would help.

    The held-out loss must exceed the other by more than 5%, and by more than two standard errors. These are at most
    √(2 / N) of the loss over N independent Gaussian inputs; tokens of one text depend on each other, so that the true
    ones may be larger.

    Args:
        relative: relative loss on the inputs of the runs.
        held_out_relative: the same of the held-out inputs.
        held_out_count: number N of held-out inputs.
    """
    more = held_out_relative - relative
    return more > CALIBRATION_EXCESS * relative and more > 2 * held_out_relative * (2 / held_out_count) ** 0.5


def check_above_floor(population_loss: float | None, floor: Floor | None, predict_zero_loss: float = 1.0) -> None:
    """Check that a population loss is not below its floor, which no chain can be; None is not checked.

    Args:
        population_loss: of a chain.
        floor: of its rank, relative to the zero predictor.
        predict_zero_loss: loss of the zero predictor, in the unit of `population_loss`.
    Raises:
        InternalError: it is, by more than rounding, so that the floor or the loss is computed wrongly.
    """
    if population_loss is None or floor is None:
        return
    relative = population_loss / predict_zero_loss
    if relative < floor.lower * (1 - ROUNDING) - ROUNDING:
        raise InternalError(
            f"rank {floor.rank}: the population loss, {relative!r} of the zero predictor's, is below its floor, "
            f"{floor.lower!r}; one of them is computed wrongly"
        )
