"""The choice of options: its bound against brute force, and its behaviour at the edges."""

import itertools

import numpy as np
import pytest

from ks.model.knapsack import choose


def brute_force(costs, losses, capacity):
    best = None
    for picks in itertools.product(*(range(len(cost)) for cost in costs)):
        cost = sum(cost[pick] for cost, pick in zip(costs, picks))
        loss = sum(loss[pick] for loss, pick in zip(losses, picks))
        if cost <= capacity and (best is None or loss < best):
            best = loss
    return best


def random_layers(seed, layers=4, options=6):
    generator = np.random.default_rng(seed)
    costs = [generator.integers(1, 60, options) for _ in range(layers)]
    return costs, [generator.random(options) for _ in range(layers)]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 1.0])
def test_the_choice_fits_and_its_bound_holds(seed, fraction):
    costs, losses = random_layers(seed)
    least = sum(min(cost) for cost in costs)
    capacity = least + fraction * (sum(max(cost) for cost in costs) - least)
    choice, best = choose(costs, losses, capacity), brute_force(costs, losses, capacity)
    assert choice.cost == sum(cost[pick] for cost, pick in zip(costs, choice.options)) <= capacity
    assert choice.loss == pytest.approx(sum(loss[pick] for loss, pick in zip(losses, choice.options)))
    assert choice.bound <= best * (1 + 1e-12)
    assert best <= choice.loss * (1 + 1e-12)
    assert choice.loss * (1 - choice.gap) <= best * (1 + 1e-9)
    assert choice.loss <= 1.5 * best  # with four layers; with many, see below


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_as_good_as_a_known_one(seed):
    """Four layers are too few for the hulls: on some seeds they alone are worse."""
    costs, losses = random_layers(seed)
    capacity = 1.6 * sum(min(cost) for cost in costs)
    choices = itertools.product(*(range(len(cost)) for cost in costs))
    fitting = [picks for picks in choices if sum(cost[pick] for cost, pick in zip(costs, picks)) <= capacity]
    known = min(fitting, key=lambda picks: sum(loss[pick] for loss, pick in zip(losses, picks)))
    assert choose(costs, losses, capacity, known).loss == pytest.approx(brute_force(costs, losses, capacity))
    too_much = [int(cost.argmax()) for cost in costs]
    assert choose(costs, losses, capacity, too_much) == choose(costs, losses, capacity)


def test_a_knapsack_that_is_too_small_has_no_choice():
    assert choose([np.array([3, 5])], [np.array([1.0, 0.5])], 2.9) is None
    assert choose([np.array([3, 5])], [np.array([1.0, 0.5])], 3).options == (0,)


def test_options_that_nobody_would_take_are_left_out():
    costs, losses = [np.array([4, 2, 2, 3])], [np.array([1.0, 0.5, 0.7, 0.5])]
    assert choose(costs, losses, 10).options == (1,)


def test_an_empty_choice_costs_nothing():
    assert choose([], [], 0).options == ()


def test_layers_of_a_large_model_are_chosen_within_a_thousandth_of_the_bound():
    """Ninety layers of five hundred options, with losses that fall like those of real weights."""
    generator = np.random.default_rng(0)
    costs, losses = [], []
    for _ in range(90):
        ranks = np.arange(1, 500)
        costs.append(np.r_[ranks * 2112, 884_736])
        losses.append(np.r_[np.exp(-ranks / generator.uniform(30, 200)) * generator.uniform(0.5, 1), 0])
    choice = choose(costs, losses, 0.5 * 90 * 884_736)
    assert 0 <= choice.gap < 1e-3
    uniform = sum(loss[np.flatnonzero(cost <= 0.5 * 884_736)].min() for cost, loss in zip(costs, losses))
    assert choice.loss < 0.9 * uniform
