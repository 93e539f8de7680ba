"""The best model of a run: which one is kept."""

import copy
import math
from types import SimpleNamespace

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


def test_a_start_that_was_never_beaten_is_the_result():
    """A factorisation of W is the optimum of two factors: a run can at most keep it."""
    trained = KSLinear.from_dense(WEIGHT, rank=2)
    optimum = trained.to_dense()
    best, plain = best_of(trained, keep_start=True), best_of(trained)
    fill(trained, 0.0)
    for found in (best, plain):
        found.offer(0.1, EPOCHS[0])
    assert torch.equal(best.chosen().to_dense(), optimum)
    assert not plain.chosen().to_dense().any()


def test_a_start_that_was_beaten_is_not_the_result():
    trained = KSLinear.from_dense(WEIGHT, rank=2)
    optimum = copy.deepcopy(trained.state_dict())
    fill(trained, 0.0)
    best = best_of(trained, keep_start=True)
    trained.load_state_dict(optimum)
    best.offer(0.1, EPOCHS[0])
    assert torch.equal(best.chosen().to_dense(), trained.to_dense())
    assert best.population_loss() < best.weight.square().sum() / 6
