"""The training loss and its gradient, and the kind of loss that a criterion is."""

from collections.abc import Callable
from enum import Enum

import torch

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LossKind(Enum):
    """What is known of a criterion; the value is its label in files and figures."""

    MEAN_SQUARED_ERROR = "mean squared error per output"
    QUADRATIC = "quadratic criterion, in squared units of the outputs"
    OTHER = "criterion, on outputs in units of the root mean square of W x"

    @property
    def has_floors(self) -> bool:
        """Floors, population loss and verdicts exist for the mean squared error alone."""
        return self is LossKind.MEAN_SQUARED_ERROR

    def unit(self, predict_zero_loss: float) -> float:
        """Return the factor from internal units to the unit that is reported; only quadratic losses have one."""
        return 1.0 if self is LossKind.OTHER else predict_zero_loss


def kind_of(criterion: Criterion, target: torch.Tensor) -> LossKind:
    """Try a criterion on targets and predictions that are off by uneven amounts, at two scales."""
    prediction = target + torch.linspace(-1, 2, target.numel(), device=target.device).reshape(target.shape)
    loss = criterion(prediction, target)
    if not torch.allclose(criterion(3 * prediction, 3 * target), 9 * loss, rtol=1e-4):
        return LossKind.OTHER
    mean_squared_error = torch.nn.functional.mse_loss(prediction, target)
    return LossKind.MEAN_SQUARED_ERROR if torch.allclose(loss, mean_squared_error) else LossKind.QUADRATIC


def squared_error_and_gradient(prediction: torch.Tensor, target: torch.Tensor, scale=1.0):
    """Return the mean squared error and `scale` times its gradient for the prediction; autograd would cost more.

    Args:
        prediction: any float dtype; the gradient has the same.
        target: same shape, float32.
        scale: of the gradient; a number or a scalar tensor.
    """
    difference = prediction - target
    loss = torch.linalg.vector_norm(difference).square_().mul_(1 / difference.numel())
    return loss, difference.mul_(2.0 / difference.numel() * scale).to(prediction.dtype)


def loss_and_gradient(criterion: Criterion, prediction: torch.Tensor, target: torch.Tensor, scale=1.0):
    """Return criterion(prediction, target) in float32 and `scale` times its gradient, computed by autograd."""
    prediction.requires_grad_()
    loss = criterion(prediction.float(), target)
    return loss.detach(), torch.autograd.grad(loss * scale, prediction)[0]
