"""End a run whose losses cannot be right; describe how a run ended: status, message, exit code."""

import math
from pathlib import Path

import torch

from ks import signals
from ks.bounds.population_loss import sampled_loss_range
from ks.chain.product import chain_product
from ks.cli import console
from ks.cli.flags import TrainerConfig
from ks.errors import InternalError, UsageError
from ks.files.status import OK, Ending, Status
from ks.layer import KSLinear
from ks.training.criterion_identity import Edits
from ks.training.problem import Problem


class Diverged(Exception):
    """The loss is not finite any more."""


def check_finite(row: dict, losses: torch.Tensor, edits: Edits) -> None:
    """Raise Diverged with the first step whose loss is not finite.

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
    if problem.validation_root is not None:
        rounding *= torch.linalg.cond(
            problem.validation_root
        ).item()  # the outputs may be far larger than they are after it
    if problem.layer_inputs.held_out is None:
        low, high = sampled_loss_range(weight, model.factors, problem.num_validation, problem.metric)
    else:  # its samples have exactly the held-out second moment
        low = high = problem.held_out_loss(model)
        # Held-out inputs may be far larger than those that were whitened, also where their outputs nearly cancel.
        rounding *= 1 + high**0.5 + _uncancelled_size(model, problem.held_out_energies())
    low, high = max(0.0, max(low, 0.0) ** 0.5 - rounding) ** 2, (high**0.5 + rounding) ** 2
    if not low <= val_loss <= high:
        raise InternalError(
            f"the relative validation loss is {val_loss:.6g}, but the exact loss of the same chain allows "
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


def ending_of(error: BaseException | None, config: TrainerConfig, problem: Problem) -> tuple[Ending, int]:
    """Return how a run ended, with a message unless it ended well, and the exit code: EXIT_INTERNAL for a bug."""
    if error is None:
        return OK, console.EXIT_OK
    if isinstance(error, Diverged):
        return Ending(Status.DIVERGED, str(error)), console.EXIT_FAILED
    if signals.came() or isinstance(error, KeyboardInterrupt):
        message = "interrupted; the finished epochs are kept, and --resume continues after them"
        return Ending(Status.INTERRUPTED, message), console.EXIT_INTERRUPTED
    # The CPU's allocator raises a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        advice = f"try --batch_size {max(1, config.batch_size // 2)}, fewer --num_samples or --dtype bfloat16"
        return Ending(Status.OUT_OF_MEMORY, f"out of memory on {problem.device}; {advice}"), console.EXIT_FAILED
    if isinstance(error, UsageError):
        return Ending(Status.FAILED, str(error)), console.EXIT_USAGE
    if isinstance(error, OSError):
        place = error.filename or Path(config.output_dir).absolute()
        advice = "fix the cause, then rerun the same command with --resume"
        return Ending(Status.FAILED, f"{error.strerror}: {place}; {advice}"), console.EXIT_FAILED
    return Ending(Status.FAILED, f"{type(error).__name__}: {error}"), console.EXIT_INTERNAL
