"""Checks of a training: finite losses after every epoch, and losses that agree with each other at the end."""

import math

import torch

from ks.bounds.population_loss import sampled_loss_range
from ks.errors import InternalError
from ks.training.problem import Problem


class Diverged(Exception):
    """The loss is not finite any more."""


def check_finite(row: dict, losses: torch.Tensor) -> None:
    """Raise Diverged, naming the first step with a loss that is not finite.

    Args:
        row: of the curves, for this epoch.
        losses: of its steps, shape (steps,).
    """
    if math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]):
        return
    bad = (~torch.isfinite(losses)).nonzero()
    step = f"step {int(bad[0]) + 1} of {len(losses)}" if len(bad) else "validation"
    raise Diverged(f"the loss is not finite at epoch {row['epoch']}, {step}; lower --lr or use --dtype float32")


def check_validation(
    val_loss: float,
    weight: torch.Tensor,
    factors: list[torch.Tensor],
    problem: Problem,
    dtype: torch.dtype,
    tf32: bool = False,
) -> None:
    """Check that a validation loss agrees with the population loss of the same chain, within sampling error.

    Args:
        val_loss: mean squared error on the validation samples, in internal units.
        weight: W in internal units, float64.
        factors: of the chain.
        problem: with the second moment of x and the number of validation samples.
        dtype, tf32: of the products.
    Raises:
        InternalError: they do not agree, so that one of the two is computed wrongly.
    """
    low, high = sampled_loss_range(weight, factors, problem.num_validation, problem.inputs)
    epsilon = 2**-10 if tf32 else torch.finfo(dtype).eps
    rounding = 4 * len(factors) * epsilon  # of the root mean squared error, whose scale is 1
    low, high = max(0.0, max(low, 0.0) ** 0.5 - rounding) ** 2, (high**0.5 + rounding) ** 2
    if not low <= val_loss <= high:
        raise InternalError(
            f"the validation loss is {val_loss:.6g} of predicting 0, but the population loss of the same chain allows "
            f"only {low:.6g} to {high:.6g}; one of them is computed wrongly"
        )
