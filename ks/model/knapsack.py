"""The multiple-choice knapsack: one option for each layer, with a small total loss at a given total cost, and a bound.

Relaxed to fractions of options, the problem is solved by the lower convex hulls of all layers, whose edges are taken in
the order of their slopes (Sinha, Zoltners, "The multiple-choice knapsack problem", Operations Research 1979). The slope
λ at which the capacity is used up gives a lower bound Σ min_j (loss_j + λ cost_j) − λ capacity on every choice. With
many layers the hulls come within a fraction of a percent of it, less than the error of interpolated losses.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COST_ROUNDING = 1e-12  # relative


@dataclass(frozen=True)
class Choice:
    """One option for each layer.

    Args:
        options: index of the option of each layer.
        cost, loss: their totals.
        bound: no choice of the same capacity has a smaller total loss.
    """

    options: tuple[int, ...]
    cost: float
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """1 − bound / loss: the fraction of the loss that a better choice could save at most."""
        return 1 - self.bound / self.loss if self.bound < self.loss * (1 - COST_ROUNDING) else 0.0


def choose(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], capacity: float, known: Sequence[int] | None = None
) -> Choice | None:
    """Return options with a small Σ loss subject to Σ cost ≤ capacity; None if the cheapest ones cost more.

    Args:
        costs: of the options of each layer, shape (options,), not negative.
        losses: likewise.
        capacity: of the knapsack.
        known: options of each layer; if they fit, the choice is at least as good.
    """
    capacity = capacity * (1 + COST_ROUNDING)
    hulls = [_lower_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    cheapest = [hull[0] for hull in hulls]
    if _total(costs, cheapest) > capacity:
        return None
    picks, slope = _along_hulls(costs, losses, hulls, capacity)
    starts = [picks] if known is None or _total(costs, known) > capacity else [picks, list(known)]
    best = min((_spend_rest(costs, losses, start, capacity) for start in starts), key=lambda pick: _total(losses, pick))
    least = sum(float((loss + slope * cost).min()) for cost, loss in zip(costs, losses))
    loss = _total(losses, best)
    return Choice(tuple(map(int, best)), _total(costs, best), loss, min(max(least - slope * capacity, 0.0), loss))


def _total(values: Sequence[np.ndarray], picks: Sequence[int]) -> float:
    return float(sum(entries[pick] for entries, pick in zip(values, picks)))


def _lower_hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Return the options on the lower convex hull, by ascending cost and descending loss."""
    hull: list[int] = []
    for end in np.lexsort((loss, cost)):
        if hull and loss[end] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            first, middle = hull[-2:]
            above = (loss[middle] - loss[first]) * (cost[end] - cost[first])
            if above < (loss[end] - loss[first]) * (cost[middle] - cost[first]):
                break
            hull.pop()
        hull.append(int(end))
    return hull


def _along_hulls(costs, losses, hulls: list[list[int]], capacity: float) -> tuple[list[int], float]:
    """Return picks on the hulls that fit, and the slope of the first edge that did not fit, or 0."""
    edges = [
        ((loss[start] - loss[end]) / (cost[end] - cost[start]), layer, end)
        for layer, (cost, loss, hull) in enumerate(zip(costs, losses, hulls))
        for start, end in itertools.pairwise(hull)
    ]
    picks = [hull[0] for hull in hulls]
    left, slope, closed = capacity - _total(costs, picks), 0.0, set()
    for steepness, layer, end in sorted(edges, key=lambda edge: -edge[0]):
        needed = costs[layer][end] - costs[layer][picks[layer]]
        if layer not in closed and needed <= left:
            picks[layer], left = end, left - needed
        else:
            slope = slope or float(steepness)
            closed.add(layer)
    return picks, slope


def _spend_rest(costs, losses, picks: Sequence[int], capacity: float) -> list[int]:
    """Return picks after single exchanges, each the one that saves the most, until none fits and saves anything."""
    picks = list(picks)
    while True:
        left = capacity - _total(costs, picks)
        best, saved = None, 0.0
        for layer, (cost, loss) in enumerate(zip(costs, losses)):
            fitting = np.flatnonzero(cost <= cost[picks[layer]] + left)
            option = fitting[loss[fitting].argmin()]
            if loss[picks[layer]] - loss[option] > saved:
                best, saved = (layer, int(option)), loss[picks[layer]] - loss[option]
        if best is None:
            return picks
        picks[best[0]] = best[1]
