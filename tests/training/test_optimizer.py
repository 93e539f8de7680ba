"""One optimizer step against that of torch.optim, and the scaling of losses for float16."""

import copy
import math

import pytest
import torch
from steps import update

from ks.training.optimizer import LossScale, Optimizer


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_updates_equal_those_of_torch_optim(name):
    """The library's optimizer with the per-factor rates, on the same clipped gradients."""
    ours = [torch.randn(2, 3, 4, 1, requires_grad=True), torch.randn(1, 2, 9, 3, requires_grad=True)]
    theirs = copy.deepcopy(ours)
    optimizer = Optimizer(name, ours, weight_decay=0.1, max_grad_norm=0.5)
    rates = [0.01 * factor for factor in optimizer.rate_factors]
    decays = [0.1 / factor if name == "adamw" else 0.1 for factor in optimizer.rate_factors]
    groups = [{"params": [p], "lr": lr, "weight_decay": decay} for p, lr, decay in zip(theirs, rates, decays)]
    library = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
        "adam": lambda: torch.optim.Adam(groups, betas=(0.9, 0.95)),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
    }[name]()
    for _ in range(4):
        norm = update(optimizer, sum((p**2).sum() for p in ours), 0.01)
        library.zero_grad()
        sum((p**2).sum() for p in theirs).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        library.step()
        torch.testing.assert_close(norm, expected_norm)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("clip", "measured", "norm"), [(1.0, False, 5.0), (0.0, True, 5.0), (0.0, False, math.nan)])
def test_the_norm_is_measured_to_clip_or_if_asked_for(clip, measured, norm):
    optimizer = Optimizer("sgd", [torch.zeros(1, 2, 1, 1)], max_grad_norm=clip, measure_norm=measured)
    optimizer.gradients[0].copy_(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1))
    assert optimizer.update(0.1, torch.ones(())).item() == pytest.approx(norm, nan_ok=True)


def test_an_overflowing_step_is_skipped_and_the_scale_halved():
    parameter = torch.ones(1, 1, 1, 1, requires_grad=True)
    optimizer = Optimizer("adamw", [parameter], loss_scaling=True)
    update(optimizer, (parameter * 1e36 * 1e3).sum(), 0.1)
    assert parameter.item() == 1.0
    assert optimizer.count.item() == 0.0
    assert optimizer.loss_scale.scale.item() == 2.0**15
    update(optimizer, (parameter * 3.0).sum(), 0.001)
    assert parameter.item() == pytest.approx(0.9)


def test_loss_scale_unscales():
    scale = LossScale("cpu")
    gradient = torch.full((2,), 2.0**16)
    assert scale.unscale(gradient).item() == 0.0
    assert torch.equal(gradient, torch.ones(2))
