"""The optimiser of a training: which one `--optimizer` means for a chain and a criterion, and its construction."""

import torch

from ks.bounds.moments import Inputs
from ks.cli.flags import OptimiserFlags
from ks.errors import UsageError
from ks.patterns import Chain
from ks.product.splits import is_chainable
from ks.training.gauss_newton import GaussNewton
from ks.training.losses import LossKind
from ks.training.optimiser import Optimiser

# On five, a step of gauss_newton costs more than two of adamw and comes less close to the floor.
MOST_FACTORS = 3


def choose_optimiser(name: str, chain: Chain) -> tuple[str, str]:
    """Choose the optimiser for a chain that learns by the mean squared error.

    Returns:
        (gauss_newton, adamw, adam or sgd; the reason).
    Raises:
        UsageError: gauss_newton for a chain that is not chainable.
    """
    patterns = chain.patterns(1)
    covered = is_chainable(patterns)
    if name == "gauss_newton" and not covered:
        raise UsageError(f"--optimizer gauss_newton needs a chainable chain, not {chain.family}; use --optimizer adamw")
    if name != "auto":
        return name, "as asked"
    if len(patterns) > MOST_FACTORS:
        return "adamw", f"gauss_newton gains little on a chain of {len(patterns)} factors"
    if covered:
        return "gauss_newton", f"the chain has {len(patterns)} chainable factors"
    return "adamw", f"gauss_newton needs a chainable chain, not {chain.family}"


def choose_for_criterion(asked: str, chosen: str, kind: LossKind) -> tuple[str, str | None]:
    """Choose again, now that the criterion is known.

    Args:
        asked: the value of --optimizer.
        chosen: by `choose_optimiser`.
        kind: of the criterion.
    Returns:
        (the optimiser, the reason if it is another one than `chosen`).
    Raises:
        UsageError: gauss_newton by name for another criterion than the mean squared error.
    """
    if chosen != "gauss_newton" or kind is LossKind.MEAN_SQUARED_ERROR:
        return chosen, None
    if asked == "gauss_newton":
        raise UsageError(
            f"--optimizer gauss_newton needs the mean squared error, but the criterion of train_with_random.py is a "
            f"{kind.value}; use --optimizer adamw"
        )
    return "adamw", "gauss_newton needs the mean squared error, and the criterion is another one"


def make_optimiser(
    name: str, flags: OptimiserFlags, factors: list[torch.Tensor], inputs: Inputs, loss_scaling: bool
) -> Optimiser:
    """Return an optimiser of the factors.

    Args:
        name: 'gauss_newton', 'adamw', 'adam' or 'sgd'.
        flags: with weight decay, clipping and batch size.
        factors: values of the chain, output side first, float32; updated in place.
        inputs: second moment of x in internal units.
        loss_scaling: for float16.
    """
    decay = flags.weight_decay
    if name == "gauss_newton":
        return GaussNewton(factors, inputs, flags.batch_size, weight_decay=decay, loss_scaling=loss_scaling)
    return Optimiser(name, factors, weight_decay=decay, max_grad_norm=flags.max_grad_norm, loss_scaling=loss_scaling)
