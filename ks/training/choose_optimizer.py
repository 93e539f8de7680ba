"""Choose the optimizer that `--optimizer` means for a chain and a criterion, and make it."""

from typing import Any

import torch

from ks.chain.patterns import Chain
from ks.chain.split_grams import is_chainable
from ks.cli.flags import TrainingFlags
from ks.errors import UsageError
from ks.moments.metric import MetricLike
from ks.training.criterion_identity import Edits
from ks.training.gauss_newton import GaussNewton
from ks.training.optimizer import Optimizer

# On five, a step of gauss_newton costs more than two of adamw and comes less close to the floor.
MOST_FACTORS = 3


def choose_optimizer(name: str, chain: Chain, edits: Edits) -> tuple[str, str]:
    """Choose the optimizer for a chain and a criterion.

    Args:
        name: value of --optimizer.
        chain: a family.
        edits: of the training script.
    Returns:
        (gauss_newton, adamw, adam or sgd; the reason).
    Raises:
        UsageError: gauss_newton for a chain that is not chainable, or for another criterion than mean_squared_error.
    """
    patterns = chain.patterns(1)
    hindrance = ""
    if not edits.criterion_is_ours:
        hindrance = f"gauss_newton needs mean_squared_error, and the criterion is {edits.criterion}"
    elif not is_chainable(patterns):
        hindrance = f"gauss_newton needs a chainable chain, not {chain.family}"
    if name == "gauss_newton" and hindrance:
        raise UsageError(f"--optimizer gauss_newton: {hindrance}; use --optimizer adamw")
    if name != "auto":
        return name, "as asked"
    if hindrance:
        return "adamw", hindrance
    if len(patterns) > MOST_FACTORS:
        return "adamw", f"gauss_newton gains little on a chain of {len(patterns)} factors"
    return "gauss_newton", f"the chain has {len(patterns)} chainable factors"


def make_optimizer(
    name: str, config: TrainingFlags, factors: list[torch.Tensor], metric: MetricLike, whitened_steps: int = 0
) -> Optimizer:
    """Return an optimizer of the factors.

    Args:
        name: 'gauss_newton', 'adamw', 'adam' or 'sgd'.
        config: with weight decay, clipping, batch size and dtype.
        factors: values of the chain, output side first, float32; updated in place.
        metric: of an error in internal units.
        whitened_steps: of an epoch; 0 for samples that are not whitened, on which gauss_newton has no epochs of least
            squares.
    """
    settings: dict[str, Any] = {"weight_decay": config.weight_decay, "loss_scaling": config.dtype == "float16"}
    settings["measure_norm"] = config.log_grad_norm or config.log_to is not None
    if name == "gauss_newton":
        decays, run = config.scheduler == "cosine", (1, 0)
        if whitened_steps and decays and not config.weight_decay:
            run = (whitened_steps, config.num_epochs)
        return GaussNewton(factors, metric, config.batch_size, rate_decays=decays, whitened_run=run, **settings)
    return Optimizer(name, factors, max_grad_norm=config.max_grad_norm, **settings)
