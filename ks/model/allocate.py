"""The choice of a chain and a rank for every layer: the least loss at a budget, or the least size at a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ks.bounds.layer_floors import LayerFloors
from ks.errors import UsageError, one_line
from ks.files.globs import matches, nearest
from ks.model.candidates import Candidates
from ks.model.knapsack import choose
from ks.model.model_plan import LayerPlan, ModelPlan, Objective, Weighting


def allocate(
    candidates: Sequence[Candidates],
    *,
    budget: float | None = None,
    target_relative_loss: float | None = None,
    importance: str | Mapping[str, float] = Weighting.EQUAL,
    rank_multiple: int = 1,
    checkpoint: str = "",
) -> ModelPlan:
    """Choose a chain and a rank for every layer, or leave it dense.

    With a budget, minimise Σ w · relative loss such that Σ parameters ≤ budget · Σ m n. With a target, minimise
    Σ parameters such that Σ w · relative loss ≤ target · Σ w. Relative losses are upper bounds, those of the best known
    chains; a dense layer loses nothing and has m n parameters. Either is a multiple-choice knapsack.

    Args:
        candidates: of every layer.
        budget: share of the dense parameters, in (0, 1].
        target_relative_loss: mean share of the output energy that may be lost, in (0, 1).
        importance: weights w of the layers: 'equal'; 'energy', their output energies, so that the sum is that of the
            energies lost; or numbers by glob over the names of the layers, 1 where none matches.
        rank_multiple: of every rank.
        checkpoint: name of the file of the weights.
    Raises:
        UsageError: neither or both of budget and target, a budget below the smallest options, or an importance of no
            layer.
    """
    if (budget is None) == (target_relative_loss is None):
        raise UsageError("a plan needs either a budget or a target for the relative loss")
    layers = [_options(entry, rank_multiple) for entry in candidates]
    weights = _weights(candidates, importance)
    costs = [layer.parameters for layer in layers]
    losses = [weight * layer.losses for weight, layer in zip(weights, layers)]
    dense = sum(entry.rows * entry.cols for entry in candidates)
    if budget is not None:
        choice = choose(costs, losses, budget * dense)
        if choice is None:
            least = sum(cost.min() for cost in costs) / dense
            raise UsageError(
                f"a budget of {budget:g}: the smallest chains have {least:.2%} of the dense parameters; give at least "
                f"{np.ceil(least * 1e4) / 1e4:g}"
            )
        uniform = [layer.best_within(budget) for layer in layers]
        objective, value = Objective.BUDGET, budget
    else:
        assert target_relative_loss is not None
        objective, value = Objective.TARGET, target_relative_loss
        limit = target_relative_loss * sum(weights)
        choice = choose(losses, costs, limit)
        assert choice is not None  # dense layers lose nothing
        uniform = _smallest_uniform(layers, weights, limit)
    return ModelPlan(
        layers=tuple(layer.plan(option) for layer, option in zip(layers, choice.options)),
        objective=objective,
        value=value,
        weighting=Weighting.GIVEN if isinstance(importance, Mapping) else Weighting(importance),
        weights=tuple(weights),
        exact=choice.exact,
        gap=choice.gap,
        uniform=tuple(layer.plan(option) for layer, option in zip(layers, uniform)),
        rank_multiple=rank_multiple,
        checkpoint=checkpoint,
    )


@dataclass(frozen=True)
class _Options:
    """The options of one layer: every rank of every family, and dense as the last one."""

    entry: Candidates
    families: list[tuple[LayerFloors, int] | None]  # family and rank; None is dense
    parameters: np.ndarray
    losses: np.ndarray

    def best_within(self, share: float) -> int:
        """Return the option with the least loss among those with this share of the dense parameters, or the smallest.

        Args:
            share: of m n.
        """
        fitting = np.flatnonzero(self.parameters <= share * self.parameters[-1])
        return int(fitting[self.losses[fitting].argmin()] if len(fitting) else self.parameters.argmin())

    def plan(self, option: int) -> LayerPlan:
        """Return an option as a plan."""
        chosen, entry = self.families[option], self.entry
        floors, rank = chosen or (None, None)
        lower = 0.0 if floors is None else float(floors.lower[rank])
        return LayerPlan(
            layer=entry.layer,
            rows=entry.rows,
            cols=entry.cols,
            weight_sha256=entry.weight_sha256,
            chain=None if floors is None else floors.chain,
            rank=rank,
            relative_loss=float(self.losses[option]),
            relative_loss_lower=lower,
            itemsize=entry.itemsize,
            interpolated=floors is not None and rank is not None and floors.is_interpolated(rank),
            shared_with=entry.shared_with,
            inputs_sha256=entry.inputs_sha256,
        )


def _options(entry: Candidates, rank_multiple: int) -> _Options:
    families: list[tuple[LayerFloors, int] | None] = []
    parameters, losses = [], []
    for floors in entry.floors:
        ranks = floors.ranks[floors.ranks % rank_multiple == 0]
        families += [(floors, int(rank)) for rank in ranks]
        parameters.append(floors.parameters[ranks - 1])
        losses.append(floors.upper[ranks])
    return _Options(
        entry,
        [*families, None],
        np.concatenate([*parameters, [entry.rows * entry.cols]]),
        np.concatenate([*losses, [0.0]]),
    )


def _weights(candidates: Sequence[Candidates], importance: str | Mapping[str, float]) -> list[float]:
    """Return the weight of every layer; those of 'energy' have a mean of 1."""
    if isinstance(importance, Mapping):
        names = [entry.layer for entry in candidates]
        for glob, weight in importance.items():
            if not any(matches(name, glob) for name in names):
                raise UsageError(f"importance of {one_line(glob)!r}: no layer matches; {nearest(glob, names)}")
            if not 0 <= weight < float("inf"):
                raise UsageError(f"importance of {one_line(glob)!r} is {weight}: a finite number from 0 on is needed")
        weights = [next((w for glob, w in importance.items() if matches(name, glob)), 1.0) for name in names]
    else:
        weights = [entry.energy if importance == Weighting.ENERGY else 1.0 for entry in candidates]
    total = sum(weights)
    if not 0 < total < float("inf"):
        raise UsageError(f"the importances of the layers add up to {total:g}; a positive number is needed")
    return [weight * len(weights) / total for weight in weights] if importance == Weighting.ENERGY else weights


def _smallest_uniform(layers: Sequence[_Options], weights: Sequence[float], limit: float) -> list[int]:
    """Return the options of the smallest share, the same in every layer, at which the total loss is within a limit."""
    shares = np.unique(np.concatenate([layer.parameters / layer.parameters[-1] for layer in layers]))
    low, high = 0, len(shares) - 1  # at a share of 1, all layers are dense
    while low < high:
        middle = (low + high) // 2
        options = [layer.best_within(shares[middle]) for layer in layers]
        loss = sum(weight * layer.losses[option] for weight, layer, option in zip(weights, layers, options))
        low, high = (low, middle) if loss <= limit else (middle + 1, high)
    return [layer.best_within(shares[low]) for layer in layers]
