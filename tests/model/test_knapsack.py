"""The choice of options: against brute force, its bound, and its behaviour at the edges."""

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
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 1.0])
def test_the_choice_is_that_of_brute_force(seed, share):
    costs, losses = random_layers(seed)
    least = sum(min(cost) for cost in costs)
    capacity = least + share * (sum(max(cost) for cost in costs) - least)
    choice = choose(costs, losses, capacity)
    assert choice.exact
    assert choice.cost <= capacity
    assert choice.loss == pytest.approx(brute_force(costs, losses, capacity), rel=1e-12)
    assert choice.loss == pytest.approx(sum(loss[pick] for loss, pick in zip(losses, choice.options)))


@pytest.mark.parametrize("seed", range(20))
def test_losses_and_costs_may_change_places(seed):
    costs, losses = random_layers(seed)
    limit = 1.1 * sum(min(loss) for loss in losses)
    choice = choose(losses, costs, limit)
    assert choice.exact
    assert choice.cost <= limit * (1 + 1e-9)
    assert choice.loss == brute_force(losses, costs, limit)


@pytest.mark.parametrize("seed", range(20))
def test_without_dynamic_programming_the_gap_is_a_bound(seed):
    costs, losses = random_layers(seed)
    capacity = 1.6 * sum(min(cost) for cost in costs)
    choice, best = choose(costs, losses, capacity, max_states=0), brute_force(costs, losses, capacity)
    assert choice.bound <= best * (1 + 1e-12)
    assert best <= choice.loss * (1 + 1e-12)
    assert choice.loss <= choice.bound * (1 + choice.gap) * (1 + 1e-12)


def test_a_knapsack_that_is_too_small_has_no_choice():
    assert choose([np.array([3, 5])], [np.array([1.0, 0.5])], 2.9) is None
    assert choose([np.array([3, 5])], [np.array([1.0, 0.5])], 3).options == (0,)


def test_options_that_nobody_would_take_are_left_out():
    costs, losses = [np.array([4, 2, 2, 3])], [np.array([1.0, 0.5, 0.7, 0.5])]
    assert choose(costs, losses, 10).options == (1,)


def test_an_empty_choice_costs_nothing():
    assert choose([], [], 0).options == ()


def test_layers_of_a_large_model_are_chosen_exactly():
    """Ninety layers of five hundred options, with losses that fall like those of real weights."""
    generator = np.random.default_rng(0)
    costs, losses = [], []
    for _ in range(90):
        ranks = np.arange(1, 500)
        costs.append(np.r_[ranks * 2112, 884_736])
        losses.append(np.r_[np.exp(-ranks / generator.uniform(30, 200)) * generator.uniform(0.5, 1), 0])
    choice = choose(costs, losses, 0.5 * 90 * 884_736)
    assert choice.exact
    uniform = sum(loss[np.flatnonzero(cost <= 0.5 * 884_736)].min() for cost, loss in zip(costs, losses))
    assert choice.loss < 0.9 * uniform
