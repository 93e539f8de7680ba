"""The criterion and the metrics of `train_with_random.py`: called, differentiated, averaged."""

import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ks.chain.bmm import float32_products
from ks.errors import UsageError, one_line
from ks.files.columns import check_metric_names
from ks.training.problem import Problem

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Metrics = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]

SCRIPT = "train_with_random.py"


def mean_squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean of (prediction − target)² over samples and outputs.

    Floors, exact losses, verdicts and Gauss–Newton belong to this function, and to no other that computes the same.
    """
    return torch.nn.functional.mse_loss(prediction, target)


def loss_and_gradient(
    criterion: Criterion, prediction: torch.Tensor, target: torch.Tensor, scale=1.0, outputs: torch.Tensor | None = None
):
    """Return criterion(prediction, target) in float32, and `scale` times its gradient for the prediction.

    The gradient of the mean squared error is written out, 2 (prediction − target) / numel; autograd would cost more.
    With a metric G of the outputs, the loss is the mean of (G^{1/2} (prediction − target))².

    Args:
        criterion: function or module that returns a scalar.
        prediction: shape (batch, m), any float dtype; the gradient has the same.
        target: same shape, float32.
        scale: of the gradient; a number or a scalar tensor.
        outputs: G, shape (m, m), float32, for our criterion; None for I.
    Raises:
        UsageError: another criterion than ours raises, or returns no scalar that depends on the prediction.
    """
    if criterion is mean_squared_error:
        difference = prediction - target
        if outputs is None:
            loss = torch.linalg.vector_norm(difference).square_().mul_(1 / difference.numel())
        else:
            with float32_products(difference):
                weighted = difference @ outputs
            loss, difference = (difference * weighted).mean(), weighted
        return loss, difference.mul_(2.0 / difference.numel() * scale).to(prediction.dtype)
    leaf = prediction.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(criterion, leaf.float(), target)
    try:
        (gradient,) = torch.autograd.grad(loss * scale, leaf)
    except RuntimeError as error:
        raise UsageError(f"the criterion of {SCRIPT} has no gradient for the prediction: {one_line(error)}") from error
    return loss.detach(), gradient


def loss_of(criterion: Criterion, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return criterion(prediction, target), a scalar tensor.

    Args:
        criterion: function or module.
        prediction, target: shape (batch, m), float32.
    Raises:
        UsageError: it raises, changes the target, or returns no scalar.
    """
    version = target._version
    try:
        loss = criterion(prediction, target)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"the criterion of {SCRIPT} failed{_failure(error)}") from error
    if not isinstance(loss, torch.Tensor) or loss.dim():
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UsageError(f"the criterion of {SCRIPT} returned {found} instead of a scalar tensor; end it with .mean()")
    if target._version != version:
        raise UsageError(f"the criterion of {SCRIPT} changes its target in place, which belongs to later epochs too")
    return loss


class GuardedMetrics:
    """The metrics, called so that no fault of theirs costs a run: a metric that fails stays empty, with one warning.

    Args:
        metrics: function of prediction and target, shape (batch, m), that returns a scalar for each name.
        warn: takes a warning for the user.

    `names` are those of the last call, also of metrics that failed.
    """

    def __init__(self, metrics: Metrics, warn: Callable[[str], None]):
        self.metrics, self.warn = metrics, warn
        self.names: list = []
        self._warned: set[str] = set()

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the metrics of one batch that are scalars with a name of their own."""
        version = target._version
        try:
            found = self.metrics(prediction, target)
            if not isinstance(found, dict):
                raise TypeError(f"it returned {type(found).__name__} instead of a dict of names and scalars")
        except Exception as error:
            self._warn("", f"metrics of {SCRIPT} stay empty, because they failed{_failure(error)}")
            found = {}
        self.names = [*found]
        if target._version != version:
            raise UsageError(f"metrics of {SCRIPT} changes its target in place, which belongs to later epochs too")
        values = {}
        for name, metric in found.items():
            try:
                check_metric_names([name])
                number = torch.as_tensor(metric, dtype=torch.float64, device="cpu")
                if number.dim():
                    raise UsageError(f"it has shape {tuple(number.shape)} instead of being a scalar")
                values[name] = number
            except (UsageError, TypeError, ValueError, RuntimeError) as error:
                self._warn(str(name), f"metric {name!r} of {SCRIPT} stays empty: {one_line(error)}")
        return values

    def _warn(self, name: str, warning: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            self.warn(warning)


def averages(batches: list[dict[str, torch.Tensor]], fractions: torch.Tensor) -> dict[str, float | None]:
    """Return the mean of every metric over batches, None if one of them lacks it.

    Args:
        batches: the metrics of each.
        fractions: of all samples that are in each batch, shape (batches,).
    """
    names = dict.fromkeys(name for batch in batches for name in batch)
    return {
        name: sum(part * batch[name].item() for part, batch in zip(fractions.tolist(), batches, strict=True))
        if all(name in batch for batch in batches)
        else None
        for name in names
    }


def check_edits(criterion: Criterion, metrics: Metrics, problem: Problem) -> tuple[list[str], list[str]]:
    """Try criterion and metrics on random batches, before anything is written; put a module on the device.

    Args:
        criterion, metrics: of the training script.
        problem: with the identity of both as it was read from the source of the script.
    Returns:
        (names of the metrics that work, warnings about the others).
    Raises:
        UsageError: the criterion fails or is not the one in the source, or a metric has a name that it cannot have.
    """
    if (criterion is mean_squared_error) != problem.edits.criterion_is_ours:
        raise UsageError(
            f"the criterion of {SCRIPT} is not what its source says ({problem.edits.criterion}); assign it once, at "
            "the top level"
        )
    if isinstance(criterion, torch.nn.Module):
        criterion.to(problem.device)
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, problem.rows, generator=generator).to(problem.device) for _ in range(2))
    loss_and_gradient(criterion, prediction, target)
    warnings: list[str] = []
    guarded = GuardedMetrics(metrics, warnings.append)
    working = guarded(prediction, target)
    check_metric_names(guarded.names)
    return [*working], warnings


def _failure(error: Exception) -> str:
    """Return the place in the user's code that raised an exception, and the exception, in one line."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is our call
    own = [frame for frame in frames if "-packages" not in frame.filename]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{place}: {type(error).__name__}: {one_line(error)}"
