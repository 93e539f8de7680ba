"""The multiple-choice knapsack: one option for each layer, with the least total loss at a given total cost.

Relaxed to fractions of options, the problem is solved by the lower convex hulls of all layers, whose edges are taken in
the order of their slopes (Sinha, Zoltners, "The multiple-choice knapsack problem", Operations Research 1979). The slope
λ at which the capacity is used up gives a lower bound Σ min_j (loss_j + λ cost_j) − λ capacity, and what an option adds
to it tells whether any better choice can hold that option (Pisinger, "A minimal algorithm for the multiple-choice
knapsack problem", EJOR 1995). Dynamic programming over the few options that are left makes the choice exact.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_STATES = 2_000_000  # of the dynamic programme: 50 MB for each layer, at most a second
ROUNDING = 1e-12  # relative


@dataclass(frozen=True)
class Choice:
    """One option for each layer.

    Args:
        options: index of the option of each layer.
        cost, loss: their totals.
        bound: a lower bound on the loss of any choice; equal to `loss` if the choice is proven to be the best.
    """

    options: tuple[int, ...]
    cost: float
    loss: float
    bound: float

    @property
    def exact(self) -> bool:
        """Return whether no choice is better."""
        return self.bound >= self.loss

    @property
    def gap(self) -> float:
        """Return by what share of the bound a better choice could at most be better."""
        return 0.0 if self.exact else self.loss / self.bound - 1 if self.bound > 0 else float("inf")


def choose(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], capacity: float, max_states: int = MAX_STATES
) -> Choice | None:
    """Return options with the least Σ loss subject to Σ cost ≤ capacity; None if the cheapest ones cost more.

    Args:
        costs: of the options of each layer, shape (options,), not negative.
        losses: likewise.
        capacity: of the knapsack.
        max_states: of the dynamic programme; beyond, the choice on the convex hulls is returned with its bound.
    """
    fronts = [_front(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    layers = [(cost[kept].astype(float), loss[kept]) for cost, loss, kept in zip(costs, losses, fronts)]
    capacity = capacity * (1 + ROUNDING)
    if sum(cost[0] for cost, _ in layers) > capacity:
        return None
    picks, slope = _on_hulls(layers, capacity)
    best = _total(layers, picks)[1]
    least = [(loss + slope * cost).min() for cost, loss in layers]
    bound = sum(least) - slope * capacity
    hopeful = [  # options that a better choice may hold
        np.flatnonzero(bound + loss + slope * cost - low < best) for (cost, loss), low in zip(layers, least)
    ]
    found = _search(layers, hopeful, capacity, slope, best, max_states)
    picks = found or picks
    cost, loss = _total(layers, picks)
    options = tuple(int(front[pick]) for front, pick in zip(fronts, picks))
    return Choice(options, cost, loss, min(bound, loss) if found is None else loss)


def _front(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return the options of which no other one is cheaper and as good, by ascending cost and descending loss."""
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    return order[np.r_[True, loss[order][1:] < best[:-1]]]


def _total(layers, picks) -> tuple[float, float]:
    return (
        float(sum(cost[pick] for (cost, _), pick in zip(layers, picks))),
        float(sum(loss[pick] for (_, loss), pick in zip(layers, picks))),
    )


def _on_hulls(layers, capacity: float) -> tuple[list[int], float]:
    """Return picks on the lower convex hulls that fit, and the slope of the first edge that did not fit, or 0."""
    edges = []
    for index, (cost, loss) in enumerate(layers):
        hull = _lower_hull(cost, loss)
        edges += [
            ((loss[start] - loss[end]) / (cost[end] - cost[start]), index, end)
            for start, end in itertools.pairwise(hull)
        ]
    picks, left = [0] * len(layers), capacity - sum(cost[0] for cost, _ in layers)
    slope, closed = 0.0, set()
    for steepness, index, end in sorted(edges, key=lambda edge: -edge[0]):
        cost = layers[index][0]
        needed = cost[end] - cost[picks[index]]
        if index not in closed and needed <= left:
            picks[index], left = end, left - needed
        else:
            slope = slope or steepness
            closed.add(index)
    return picks, slope


def _lower_hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Return the vertices of the lower convex hull of a front."""
    hull: list[int] = []
    for end in range(len(cost)):
        while len(hull) > 1:
            first, middle = hull[-2:]
            above = (loss[middle] - loss[first]) * (cost[end] - cost[first])
            if above < (loss[end] - loss[first]) * (cost[middle] - cost[first]):
                break
            hull.pop()
        hull.append(end)
    return hull


def _search(layers, hopeful, capacity: float, slope: float, best: float, max_states: int) -> list[int] | None:
    """Return the picks of a choice better than `best`, [] if there is none, None if there are too many states.

    A state is the cost and the loss of options for the first layers; one that another state beats in both is dropped,
    and so is one whose bound says that it ends no better than `best`.
    """
    if any(len(options) == 0 for options in hopeful):
        return []
    least = [(loss + slope * cost).min() for cost, loss in layers]
    cheapest = [cost[options].min() for (cost, _), options in zip(layers, hopeful)]
    costs, losses = np.zeros(1), np.zeros(1)
    history = []
    for index, ((cost, loss), options) in enumerate(zip(layers, hopeful)):
        if len(costs) * len(options) > max_states:
            return None
        new_costs = np.add.outer(costs, cost[options]).ravel()
        new_losses = np.add.outer(losses, loss[options]).ravel()
        bounds = new_losses + slope * (new_costs - capacity) + sum(least[index + 1 :])
        possible = np.flatnonzero((new_costs + sum(cheapest[index + 1 :]) <= capacity) & (bounds < best))
        if len(possible) == 0:
            return []
        kept = possible[_front(new_costs[possible], new_losses[possible])]
        history.append(np.divmod(kept, len(options)))
        costs, losses = new_costs[kept], new_losses[kept]
    state, picks = int(losses.argmin()), []
    for (parents, chosen), options in zip(reversed(history), reversed(hopeful)):
        picks.append(int(options[chosen[state]]))
        state = parents[state]
    return picks[::-1]
