"""The predicted increase of the loss of a model: in words, and against the increase that was measured."""

import math
import statistics
from collections.abc import Iterable

from ks.errors import UsageError

OVERFLOW = 700.0  # nats, whose exponential is near the largest float


def per_token(increase: float, unit: str) -> str:
    """Return an increase of the loss per token in words, for a loss in nats also as a factor of the perplexity."""
    if unit != "nats":
        return f"{increase:.3g} per token" + (f" ({unit})" if unit else "")
    nats, digits = f"{increase:.3g} nats per token", 4 if abs(increase) >= 0.001 else 7
    return f"{nats} (perplexity × {math.exp(increase):.{digits}g})" if increase < OVERFLOW else nats


def measured_over_predicted(pairs: Iterable[tuple[float, float]]) -> float:
    """Return the factor f with measured ≈ f · predicted, the geometric mean of the ratios.

    It is the least squares fit in the logarithm: the prediction errs by a factor, about the same for small and large
    increases, whereas a fit through the origin would go by the largest increase alone, for which a prediction to second
    order is the least accurate.

    Args:
        pairs: predicted and measured increase of each plan.
    Raises:
        UsageError: no pair, or an increase that is not positive.
    """
    pairs = list(pairs)
    if not pairs or min(map(min, pairs)) <= 0:
        raise UsageError("a prediction is calibrated by plans with a predicted and a measured increase above 0")
    return statistics.geometric_mean(measured / predicted for predicted, measured in pairs)
