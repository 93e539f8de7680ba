"""Which optimizer `auto` and the names mean, for a chain and for a criterion."""

import dataclasses

import pytest

from ks.chain.patterns import make_chain
from ks.cli.flags import TrainerConfig
from ks.errors import UsageError
from ks.layer import KSLinear
from ks.moments.second_moment import UNIT_MOMENT
from ks.training.choose_optimizer import choose_optimizer, make_optimizer
from ks.training.criterion_identity import TOOLKIT, Edits
from ks.training.gauss_newton import GaussNewton
from ks.training.optimizer import Optimizer

GRID, NOT_CHAINABLE = make_chain(16, 24), make_chain(16, 24, "lowrank_butterfly")


def test_auto_is_gauss_newton_for_a_chainable_chain_and_else_adamw_with_the_reason():
    assert choose_optimizer("auto", GRID, TOOLKIT) == ("gauss_newton", "the chain has 2 chainable factors")
    reason = "gauss_newton needs a chainable chain, not lowrank_butterfly"
    assert choose_optimizer("auto", make_chain(3, 4, "lowrank_butterfly"), TOOLKIT)[0] == "adamw"
    assert choose_optimizer("auto", make_chain(64, 64, "butterfly", num_factors=3), TOOLKIT)[0] == "gauss_newton"
    reason = "gauss_newton gains little on a chain of 5 factors"
    assert choose_optimizer("auto", make_chain(64, 64, "butterfly", num_factors=5), TOOLKIT) == ("adamw", reason)
    assert choose_optimizer("adam", NOT_CHAINABLE, TOOLKIT) == ("adam", "as asked")


def test_gauss_newton_by_name_where_it_does_not_apply_is_an_error():
    with pytest.raises(UsageError, match="needs a chainable chain, not lowrank_butterfly; use"):
        choose_optimizer("gauss_newton", NOT_CHAINABLE, TOOLKIT)
    with pytest.raises(UsageError, match="gauss_newton needs mean_squared_error, and the criterion is mine; use"):
        choose_optimizer("gauss_newton", GRID, Edits("mine"))


def test_another_criterion_turns_auto_into_adamw():
    reason = "gauss_newton needs mean_squared_error, and the criterion is mine"
    assert choose_optimizer("auto", GRID, Edits("mine")) == ("adamw", reason)
    assert choose_optimizer("sgd", GRID, Edits("mine")) == ("sgd", "as asked")


def test_the_optimizer_takes_the_flags():
    factors = [factor.detach() for factor in KSLinear(24, 16, rank=2).factors]
    flags = TrainerConfig(batch_size=8, weight_decay=0.5, max_grad_norm=3.0)
    ours = make_optimizer("gauss_newton", dataclasses.replace(flags, dtype="float16"), factors, UNIT_MOMENT)
    assert isinstance(ours, GaussNewton)
    assert ours.weight_decay == 0.5
    assert ours.loss_scale is not None
    adamw = make_optimizer("adamw", flags, factors, UNIT_MOMENT)
    assert type(adamw) is Optimizer
    assert (adamw.name, adamw.max_grad_norm, adamw.loss_scale) == ("adamw", 3.0, None)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [({}, 3), ({"scheduler": "none"}, 3), ({"weight_decay": 0.1}, 3), ({}, 0)],
    ids=["default", "a rate that stays", "weight decay", "samples that are not whitened"],
)
def test_least_squares_end_a_default_run_on_whitened_samples_alone(flags, steps):
    factors = [factor.detach() for factor in KSLinear(24, 16, rank=2).factors]
    optimizer = make_optimizer("gauss_newton", TrainerConfig(num_epochs=8, **flags), factors, UNIT_MOMENT, steps)
    optimizer.prepare(3 * 7)  # the first step of the last epoch
    assert bool(optimizer.phase) == (not flags and steps > 0)
