"""Losses that cannot be right end a training: not finite, or in contradiction to the population loss."""

import math
from types import SimpleNamespace

import pytest
import torch
from steps import WEIGHT

from ks.bounds.moments import UNIT_INPUTS
from ks.bounds.population_loss import population_loss
from ks.errors import InternalError
from ks.layer import KSLinear
from ks.training.checks import Diverged, check_finite, check_validation


def test_finite_losses_pass():
    check_finite({"epoch": 3, "train_loss": 1.0, "val_loss": 2.0}, torch.ones(4))


@pytest.mark.parametrize(
    ("train_loss", "val_loss", "losses", "place"),
    [
        (math.nan, math.nan, [1.0, 1.0, math.nan, math.nan], "epoch 3, step 3 of 4"),
        (math.inf, 1.0, [1.0, math.inf, 1.0, 1.0], "epoch 3, step 2 of 4"),
        (1.0, math.inf, [1.0, 1.0, 1.0, 1.0], "epoch 3, validation"),
    ],
)
def test_the_first_step_whose_loss_is_not_finite_is_named(train_loss, val_loss, losses, place):
    row = {"epoch": 3, "train_loss": train_loss, "val_loss": val_loss}
    with pytest.raises(Diverged, match=place):
        check_finite(row, torch.tensor(losses))


@pytest.mark.parametrize(
    ("dtype", "tf32", "wrong"),
    [
        (torch.float32, False, 0.02),
        (torch.float32, True, 0.05),
        (torch.float16, False, 0.05),
        (torch.bfloat16, False, 0.2),
    ],
)
def test_a_validation_loss_that_contradicts_the_population_loss_is_a_fault(dtype, tf32, wrong):
    weight = WEIGHT.double() * 6**0.5 / WEIGHT.norm()
    torch.manual_seed(0)
    factors = KSLinear(10, 6, rank=2).factors
    problem = SimpleNamespace(num_validation=10**7, inputs=UNIT_INPUTS)
    loss = population_loss(weight, factors)
    check_validation(loss, weight, factors, problem, dtype, tf32)
    for factor in (1 - wrong, 1 + wrong):
        with pytest.raises(InternalError, match="one of them is computed wrongly"):
            check_validation(factor * loss, weight, factors, problem, dtype, tf32)
    if dtype == torch.bfloat16 or tf32:
        check_validation(1.005 * loss, weight, factors, problem, dtype, tf32)
    # Few samples prove less.
    few = SimpleNamespace(num_validation=10, inputs=UNIT_INPUTS)
    check_validation((1 + wrong) * loss, weight, factors, few, dtype, tf32)
