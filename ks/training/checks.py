"""Checks of a training: finite losses after every epoch, and losses that agree with each other at the end."""

import math

import torch

from ks.bounds.population_loss import sampled_loss_range
from ks.chain.operator import chain_product
from ks.errors import InternalError
from ks.layer import KSLinear
from ks.training.edits import Edits
from ks.training.problem import Problem


class Diverged(Exception):
    """The loss is not finite any more."""


def check_finite(row: dict, losses: torch.Tensor, edits: Edits) -> None:
    """Raise Diverged, naming the first step with a loss that is not finite.

    Args:
        row: of the curves, for this epoch.
        losses: of its steps, shape (steps,).
        edits: whose criterion computed them.
    """
    if math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]):
        return
    bad = (~torch.isfinite(losses)).nonzero()
    step = f"step {int(bad[0]) + 1} of {len(losses)}" if len(bad) else "validation"
    name, advice = "", "lower --lr or use --dtype float32"
    if not edits.criterion_is_ours:
        name, advice = f" (criterion {edits.criterion})", "look for a root, logarithm or division in it, or lower --lr"
    raise Diverged(f"the loss{name} is not finite at epoch {row['epoch']}, {step}; {advice}")


def check_validation(
    val_loss: float,
    weight: torch.Tensor,
    model: KSLinear,
    problem: Problem,
    dtype: torch.dtype,
    tf32: bool = False,
) -> None:
    """Check that a validation loss agrees with the exact loss of the same chain, within sampling error and rounding.

    Args:
        val_loss: mean squared error on the validation samples, in internal units.
        weight: W in internal coordinates, float64.
        model: the chain, in internal coordinates.
        problem: with the second moments and the number of validation samples.
        dtype, tf32: of the products.
    Raises:
        InternalError: they do not agree, so that one of the two is computed wrongly.
    """
    epsilon = 2**-10 if tf32 else torch.finfo(dtype).eps
    rounding = 4 * len(model.factors) * epsilon  # of the root mean squared error, whose scale is 1
    if problem.layer_inputs.held_out is None:
        low, high = sampled_loss_range(weight, model.factors, problem.num_validation, problem.moment)
    else:  # its samples have exactly the held-out second moment
        low = high = problem.held_out_loss(model)
        # Held-out inputs may be far larger than those that were whitened, also where their outputs nearly cancel.
        rounding *= 1 + high**0.5 + _uncancelled_size(model, problem.held_out_energies())
    low, high = max(0.0, max(low, 0.0) ** 0.5 - rounding) ** 2, (high**0.5 + rounding) ** 2
    if not low <= val_loss <= high:
        raise InternalError(
            f"the validation loss is {val_loss:.6g} of predicting 0, but the exact loss of the same chain allows "
            f"only {low:.6g} to {high:.6g}; one of them is computed wrongly"
        )


def _uncancelled_size(model: KSLinear, energies: torch.Tensor) -> float:
    """Return the root mean square of the outputs if no two terms of any sum cancelled: rounding errors scale with it.

    Args:
        model: of n features.
        energies: E[x_j²], shape (n,), float64.
    """
    squares = [factor.detach().double().square() for factor in model.factors]
    outputs = chain_product(energies.to(squares[0].device).unsqueeze(0), squares, False, impl="bmm")
    return outputs.mean().item() ** 0.5
