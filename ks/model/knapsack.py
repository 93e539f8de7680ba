"""The multiple-choice knapsack: one option for each layer, with a small total loss at a given total cost, and a bound.

Relaxed to fractions of options, the problem is solved by the lower convex hulls of all layers, whose edges are taken in
the order of their slopes (Sinha, Zoltners, "The multiple-choice knapsack problem", Operations Research 1979). The slope
λ at which the capacity is used up gives a lower bound Σ min_j (loss_j + λ cost_j) − λ capacity on every choice. With
many layers the hulls come within a fraction of a percent of it, less than the error of interpolated losses.
"""

import itertools
from collections.abc import Sequence

import numpy as np

COST_ROUNDING = 1e-12  # relative


def choose(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], capacity: float, known: Sequence[int]
) -> tuple[list[int], float] | None:
    """Choose one option for each layer, with a small Σ loss subject to Σ cost ≤ capacity.

    Args:
        costs: of the options of each layer, shape (options,), not negative.
        losses: likewise.
        capacity: of the knapsack.
        known: options of each layer; if they fit, the choice is at least as good.
    Returns:
        the index of the option of each layer, and the fraction of the loss that a better choice could save at most;
        None if the cheapest options cost more than the capacity.
    """
    capacity = capacity * (1 + COST_ROUNDING)
    hulls = [_lower_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    if _total(costs, [hull[0] for hull in hulls]) > capacity:
        return None
    picks, slope = _along_hulls(costs, losses, hulls, capacity)
    starts = [picks, known] if _total(costs, known) <= capacity else [picks]
    best = min((_spend_rest(costs, losses, start, capacity) for start in starts), key=lambda pick: _total(losses, pick))
    loss = _total(losses, best)
    least = sum(float((loss + slope * cost).min()) for cost, loss in zip(costs, losses))
    bound = max(least - slope * capacity, 0.0)
    return best, 1 - bound / loss if bound < loss * (1 - COST_ROUNDING) else 0.0


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
