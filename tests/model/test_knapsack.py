"""The choice of options: its bound against brute force, and its behaviour at the edges."""

import itertools

import numpy as np
import pytest

from ks.model.knapsack import choose


def brute_force(costs, losses, capacity):
    """The least loss that fits, and its options."""
    choices = itertools.product(*(range(len(cost)) for cost in costs))
    fitting = [picks for picks in choices if total(costs, picks) <= capacity]
    return min((total(losses, picks), picks) for picks in fitting)


def random_layers(seed, layers=4, options=6):
    generator = np.random.default_rng(seed)
    costs = [generator.integers(1, 60, options) for _ in range(layers)]
    return costs, [generator.random(options) for _ in range(layers)]


def cheapest(costs):
    return [int(np.argmin(cost)) for cost in costs]


def total(values, picks):
    return sum(entries[pick] for entries, pick in zip(values, picks, strict=True))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 1.0])
def test_the_choice_fits_and_its_gap_holds(fraction):
    for seed in range(40):
        costs, losses = random_layers(seed)
        least = sum(min(cost) for cost in costs)
        capacity = least + fraction * (sum(max(cost) for cost in costs) - least)
        options, gap = choose(costs, losses, capacity, cheapest(costs))
        best, loss = brute_force(costs, losses, capacity)[0], total(losses, options)
        assert total(costs, options) <= capacity
        assert loss * (1 - gap) <= best * (1 + 1e-9)
        assert best <= loss * (1 + 1e-12)
        assert loss <= 1.5 * best  # with four layers; with many, see below


def test_the_choice_is_as_good_as_a_known_one():
    """Four layers are too few for the hulls: on some seeds they alone are worse."""
    for seed in range(20):
        costs, losses = random_layers(seed)
        capacity = 1.6 * sum(min(cost) for cost in costs)
        best, known = brute_force(costs, losses, capacity)
        assert total(losses, choose(costs, losses, capacity, known)[0]) == pytest.approx(best)
        too_much = [int(cost.argmax()) for cost in costs]
        assert total(costs, choose(costs, losses, capacity, too_much)[0]) <= capacity


def test_a_knapsack_that_is_too_small_has_no_choice():
    assert choose([np.array([3, 5])], [np.array([1.0, 0.5])], 2.9, [0]) is None
    assert choose([np.array([3, 5])], [np.array([1.0, 0.5])], 3, [0]) == ([0], pytest.approx(0))


def test_options_that_nobody_would_take_are_left_out():
    costs, losses = [np.array([4, 2, 2, 3])], [np.array([1.0, 0.5, 0.7, 0.5])]
    assert choose(costs, losses, 10, [0]) == ([1], 0)


def test_layers_of_a_large_model_are_chosen_within_a_thousandth_of_the_bound():
    """Ninety layers of five hundred options, with losses that fall like those of real weights."""
    generator = np.random.default_rng(0)
    costs, losses = [], []
    for _ in range(90):
        ranks = np.arange(1, 500)
        costs.append(np.r_[ranks * 2112, 884_736])
        losses.append(np.r_[np.exp(-ranks / generator.uniform(30, 200)) * generator.uniform(0.5, 1), 0])
    options, gap = choose(costs, losses, 0.5 * 90 * 884_736, cheapest(costs))
    assert 0 <= gap < 1e-3
    uniform = sum(loss[np.flatnonzero(cost <= 0.5 * 884_736)].min() for cost, loss in zip(costs, losses))
    assert total(losses, options) < 0.9 * uniform
