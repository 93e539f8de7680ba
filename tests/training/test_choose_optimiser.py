"""Which optimiser `auto` and the names mean, for a chain and for a criterion."""

import pytest

from ks.bounds.moments import UNIT_INPUTS
from ks.cli.flags import TrainerConfig
from ks.errors import UsageError
from ks.layer import KSLinear
from ks.patterns import make_chain
from ks.training.choose_optimiser import choose_for_criterion, choose_optimiser, make_optimiser
from ks.training.gauss_newton import GaussNewton
from ks.training.losses import LossKind
from ks.training.optimiser import Optimiser

GRID, NOT_CHAINABLE = make_chain(16, 24), make_chain(16, 24, "lowrank_butterfly")


def test_auto_is_gauss_newton_for_a_chainable_chain_and_else_adamw_with_the_reason():
    assert choose_optimiser("auto", GRID) == ("gauss_newton", "the chain has 2 chainable factors")
    reason = "gauss_newton needs a chainable chain, not lowrank_butterfly"
    assert choose_optimiser("auto", make_chain(3, 4, "lowrank_butterfly"))[0] == "adamw"
    assert choose_optimiser("auto", make_chain(64, 64, "butterfly", num_factors=3))[0] == "gauss_newton"
    reason = "gauss_newton gains little on a chain of 5 factors"
    assert choose_optimiser("auto", make_chain(64, 64, "butterfly", num_factors=5)) == ("adamw", reason)
    assert choose_optimiser("adam", NOT_CHAINABLE) == ("adam", "as asked")


def test_gauss_newton_by_name_where_it_does_not_apply_is_an_error():
    with pytest.raises(UsageError, match="needs a chainable chain, not lowrank_butterfly; use"):
        choose_optimiser("gauss_newton", NOT_CHAINABLE)
    with pytest.raises(UsageError, match="--optimizer gauss_newton needs the mean squared error, but"):
        choose_for_criterion("gauss_newton", "gauss_newton", LossKind.QUADRATIC)


@pytest.mark.parametrize("kind", LossKind)
def test_another_criterion_turns_auto_into_adamw(kind):
    name, reason = choose_for_criterion("auto", "gauss_newton", kind)
    assert (name, bool(reason)) == (("gauss_newton", False) if kind.has_floors else ("adamw", True))
    assert choose_for_criterion("sgd", "sgd", kind) == ("sgd", None)


def test_the_optimiser_takes_the_flags():
    factors = [factor.detach() for factor in KSLinear(24, 16, rank=2).factors]
    flags = TrainerConfig(batch_size=8, weight_decay=0.5, max_grad_norm=3.0)
    ours = make_optimiser("gauss_newton", flags, factors, UNIT_INPUTS, loss_scaling=True)
    assert isinstance(ours, GaussNewton)
    assert ours.weight_decay == 0.5
    assert ours.loss_scale is not None
    adamw = make_optimiser("adamw", flags, factors, UNIT_INPUTS, loss_scaling=False)
    assert type(adamw) is Optimiser
    assert (adamw.name, adamw.max_grad_norm, adamw.loss_scale) == ("adamw", 3.0, None)
