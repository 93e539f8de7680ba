"""Losses that cannot be right end a run: not finite, or in contradiction to the population loss."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from steps import WEIGHT

from ks.bounds.population_loss import population_loss
from ks.errors import InternalError
from ks.layer import KSLinear
from ks.moments.metric import Metric
from ks.training.criterion_identity import TOOLKIT, Edits
from ks.training.endings import Diverged, check_finite, check_validation


@pytest.mark.parametrize(
    ("train_loss", "val_loss", "losses", "place"),
    [
        (math.nan, math.nan, [1.0, 1.0, math.nan, math.nan], "epoch 3, step 3 of 4"),
        (1.0, math.inf, [1.0, 1.0, 1.0, 1.0], "epoch 3, validation"),
    ],
)
def test_the_message_has_the_first_step_whose_loss_is_not_finite(train_loss, val_loss, losses, place):
    row = {"epoch": 3, "train_loss": train_loss, "val_loss": val_loss}
    for edits, name in ((TOOLKIT, ""), (Edits("mine"), r" \(criterion mine\)")):
        with pytest.raises(Diverged, match=f"^the loss{name} is not finite at {place}"):
            check_finite(row, torch.tensor(losses), edits)


@pytest.mark.parametrize(
    ("dtype", "tf32", "wrong"),
    [(torch.float32, False, 0.02), (torch.float32, True, 0.05), (torch.bfloat16, False, 0.2)],
)
def test_a_validation_loss_that_contradicts_the_population_loss_is_a_fault(dtype, tf32, wrong):
    weight = WEIGHT.double() * 6**0.5 / WEIGHT.norm()
    torch.manual_seed(0)
    model = KSLinear(10, 6, rank=2)
    inputs = SimpleNamespace(held_out=None)
    problem = SimpleNamespace(num_validation=10**7, metric=Metric(), layer_inputs=inputs, validation_root=None)
    loss = population_loss(weight, model.factors)
    check_validation(loss, weight, model, problem, dtype, tf32)
    for factor in (1 - wrong, 1 + wrong):
        with pytest.raises(InternalError, match="one of them is computed wrongly"):
            check_validation(factor * loss, weight, model, problem, dtype, tf32)
    if dtype == torch.bfloat16 or tf32:
        check_validation(1.005 * loss, weight, model, problem, dtype, tf32)
    # Few samples prove less.
    few = SimpleNamespace(**vars(problem) | {"num_validation": 10})
    check_validation((1 + wrong) * loss, weight, model, few, dtype, tf32)


@pytest.mark.parametrize(("energy", "holds"), [(1.0, False), (1e6, True)])
def test_a_validation_loss_on_held_out_inputs_must_be_the_exact_one(energy, holds):
    """Inputs a thousand times as large may round off a thousand times as much, though outputs cancel."""
    weight = WEIGHT.double() * 6**0.5 / WEIGHT.norm()
    torch.manual_seed(0)
    problem = SimpleNamespace(
        validation_root=None,
        held_out_loss=lambda model: 0.25,
        layer_inputs=SimpleNamespace(held_out=Metric()),
        held_out_energies=lambda: torch.full((10,), energy, dtype=torch.float64),
    )
    for factor in (1, 1 - 1e-4, 1 + 1e-4):
        refused = contextlib.nullcontext() if holds or factor == 1 else pytest.raises(InternalError, match="wrongly")
        with refused:
            check_validation(factor * 0.25, weight, KSLinear(10, 6, rank=2), problem, torch.float32)
