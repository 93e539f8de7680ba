"""The best model of a run: which one is kept."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from steps import WEIGHT

from ks.layer import KSLinear
from ks.moments.second_moment import UNIT_MOMENT
from ks.training.best_model import BestModel

EPOCHS = [{"epoch": number} for number in (1, 2, 3)]


def fill(model, value):
    with torch.no_grad():
        for factor in model.factors:
            factor.fill_(value)


def best_of(model, keep_start=False):
    return BestModel(SimpleNamespace(model=model), WEIGHT.double(), UNIT_MOMENT, keep_start)


def test_the_model_of_the_lowest_loss_is_kept_as_it_was():
    model = KSLinear(10, 6, rank=2)
    best = best_of(model)
    for row, loss in zip(EPOCHS, (0.5, 0.2, math.nan), strict=True):
        fill(model, loss)
        best.offer(loss, row)
    assert (best.val_loss, best.row) == (0.2, EPOCHS[1])
    assert all((factor == 0.2).all() for factor in best.chosen().factors)


@pytest.mark.parametrize("beaten", [False, True])
def test_the_start_is_the_result_unless_it_was_beaten(beaten):
    """A factorisation of W is the optimum of two factors: a run from there can at most keep it."""
    model = KSLinear.from_dense(WEIGHT, rank=2)
    optimum = copy.deepcopy(model.state_dict())
    if beaten:
        fill(model, 0.0)
    best, plain = best_of(model, keep_start=True), best_of(model)
    model.load_state_dict(optimum) if beaten else fill(model, 0.0)
    for found in (best, plain):
        found.offer(0.1, EPOCHS[0])
    assert best.chosen().to_dense().any()
    assert torch.equal(plain.chosen().to_dense(), model.to_dense())
    assert (best.chosen() is best.kept) is beaten
