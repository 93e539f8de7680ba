"""The training loss, its gradient, and the kind of loss that a criterion is."""

import pytest
import torch

from ks.training.losses import LossKind, kind_of, loss_and_gradient, squared_error_and_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_written_out_gradient_is_that_of_autograd(dtype):
    prediction, target = torch.randn(5, 7).to(dtype), torch.randn(5, 7)
    ours = squared_error_and_gradient(prediction, target, torch.tensor(4.0))
    theirs = loss_and_gradient(torch.nn.functional.mse_loss, prediction, target, 4.0)
    for mine, other in zip(ours, theirs):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other)


def weighted_squared_error(prediction, target):
    """Every other output counts double."""
    weights = 1.0 + torch.arange(target.shape[-1], device=target.device) % 2
    return (weights * (prediction - target) ** 2).mean()


def relative_squared_error(prediction, target):
    """The same at every scale."""
    return (prediction - target).square().sum() / target.square().sum()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(
    ("criterion", "kind"),
    [
        (torch.nn.functional.mse_loss, LossKind.MEAN_SQUARED_ERROR),
        (lambda prediction, target: (prediction - target).square().mean(), LossKind.MEAN_SQUARED_ERROR),
        (weighted_squared_error, LossKind.QUADRATIC),
        (lambda prediction, target: 2 * torch.nn.functional.mse_loss(prediction, target), LossKind.QUADRATIC),
        (torch.nn.functional.l1_loss, LossKind.OTHER),
        (torch.nn.functional.smooth_l1_loss, LossKind.OTHER),
        (torch.nn.functional.huber_loss, LossKind.OTHER),
        (lambda prediction, target: 2 * torch.nn.functional.huber_loss(prediction, target, delta=3), LossKind.OTHER),
        (relative_squared_error, LossKind.OTHER),
        (lambda prediction, target: (prediction - target).abs().pow(3).mean(), LossKind.OTHER),
    ],
    ids=[
        "mse",
        "mse by hand",
        "weighted",
        "doubled",
        "absolute",
        "smooth",
        "huber",
        "squared up to 3",
        "relative",
        "cubic",
    ],
)
def test_the_kind_of_a_criterion(criterion, kind, scale):
    target = scale * torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    assert kind_of(criterion, target) is kind


def test_only_the_mean_squared_error_has_floors_and_only_squares_have_a_unit():
    assert [kind for kind in LossKind if kind.has_floors] == [LossKind.MEAN_SQUARED_ERROR]
    assert LossKind.MEAN_SQUARED_ERROR.unit(7.0) == LossKind.QUADRATIC.unit(7.0) == 7.0
    assert LossKind.OTHER.unit(7.0) == 1.0
