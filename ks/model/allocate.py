"""Choose a chain and a rank for every layer: the least loss at a budget, or the fewest parameters at a target loss."""

import bisect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ks.chain.patterns import make_chain
from ks.errors import UsageError
from ks.model.candidates import Candidates, check_inputs, find_candidates
from ks.model.knapsack import COST_ROUNDING, choose
from ks.model.layer_plan import LayerPlan
from ks.model.layer_weights import Selection, select_weights
from ks.model.model_plan import ModelPlan, Objective
from ks.moments.metric import LossMetric
from ks.moments.moments_file import InputMoments, as_moments


def plan_model(
    weights: str | Path | Mapping[str, torch.Tensor] | torch.nn.Module,
    layers: str | Sequence[str] = "**",
    *,
    budget: float | None = None,
    target_relative_loss: float | None = None,
    target_loss_increase: float | None = None,
    loss_metric: LossMetric | str | None = None,
    moments: InputMoments | str | Path | None = None,
    chains: Sequence[str] | None = None,
    blocks: int = 4,
    num_factors: int = 3,
    rank_multiple: int = 1,
    floors_path: str | Path | None = None,
    transpose: bool = False,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> ModelPlan:
    """Choose a chain and a rank for every weight that globs name, or leave it dense, without training.

    Args:
        weights: a file, the .index.json of a sharded checkpoint, tensors by name, or a model.
        layers: globs over the names of the weights; `*` matches one component of a name, `**` any number of them.
        budget: the largest fraction of the dense parameters, in (0, 1]; the plan loses as little as possible.
        target_relative_loss: the largest mean fraction of the output energy that the layers may lose, in (0, 1); the
            plan has as few parameters as possible.
        target_loss_increase: likewise, the largest predicted increase of the loss of the model per token, in the unit
            of the loss.
        loss_metric: 'model_loss' to minimise the increase of the loss of the model, summed over the layers;
            'output_energy' to minimise the sum of the fractions of output energy that they lose. None for the loss of
            the model if the moments have its gradients, unless the target is one of the output energy.
        moments: of the inputs of these layers (`ks.collect_input_moments`), or their file; None for isotropic inputs.
        chains: families to choose from, best for each layer; None for `USUAL_FAMILIES` of the metric.
        blocks, num_factors: of the families, as in `ks.make_chain`.
        rank_multiple: of every rank; a multiple of 8 suits the matrix units of GPUs.
        floors_path: .npz file in which floors are kept, so that the next plan takes seconds.
        transpose: weights are stored as (in, out).
        device: on which floors are computed.
        quiet: whether to omit a line for each layer on stderr.
    Raises:
        UsageError: no weight matches, a weight without moments or gradients, a budget that no plan meets.
    """
    moments = as_moments(moments)
    goal = goal_of(budget, target_relative_loss, target_loss_increase)
    if goal is None:
        raise UsageError("a plan needs a goal: give budget, target_relative_loss or target_loss_increase")
    metric = plan_metric(loss_metric, moments, goal)

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    selection = select_weights(weights, layers, transpose)
    for note in selection.notes:
        say(note)
    check_inputs(selection.weights, moments, metric)
    candidates = find_candidates(
        selection.weights,
        lambda rows, cols, family: make_chain(rows, cols, family, blocks=blocks, num_factors=num_factors),
        chains or USUAL_FAMILIES[metric],
        moments,
        None if floors_path is None else Path(floors_path),
        device,
        say,
        loss_metric=metric,
    )
    return allocate(candidates, goal, rank_multiple, selection)


# A grid takes minutes a layer where gradients couple its row groups.
USUAL_FAMILIES = {LossMetric.OUTPUT_ENERGY: ("monarch", "lowrank"), LossMetric.MODEL_LOSS: ("lowrank",)}
Goal = tuple[Objective, float]  # with the largest fraction of the dense parameters, or the largest loss
METRIC_OF_TARGET = {
    Objective.TARGET: LossMetric.OUTPUT_ENERGY,
    Objective.TARGET_LOSS_INCREASE: LossMetric.MODEL_LOSS,
}


def goal_of(
    budget: float | None, target_relative_loss: float | None, target_loss_increase: float | None
) -> Goal | None:
    """Return the goal that these arguments of `plan_model` give, None if they give none.

    Raises:
        UsageError: they give several.
    """
    names = ("budget", "target_relative_loss", "target_loss_increase")
    values = (budget, target_relative_loss, target_loss_increase)
    given = [(name, (goal, value)) for name, goal, value in zip(names, Objective, values) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' together with '.join(name for name, _ in given)}: give one or the other")
    return given[0][1] if given else None


def plan_metric(loss_metric: LossMetric | str | None, moments: InputMoments | None, goal: Goal | None) -> LossMetric:
    """Return the metric of a plan with a goal, or of a comparison of families without one.

    Raises:
        UsageError: a metric that does not exist, that the target excludes, or for which there are no gradients.
    """
    if loss_metric is not None and loss_metric not in [*LossMetric]:
        raise UsageError(f"a loss metric {loss_metric!r}: {' or '.join(LossMetric)} is possible")
    has_gradients = moments is not None and len(moments.gradients) > 0
    by_target = METRIC_OF_TARGET.get(goal[0]) if goal else None
    if by_target is not None and loss_metric not in (None, by_target):
        raise UsageError(
            f"a target for {by_target} together with the loss metric {loss_metric}: leave out one or the other"
        )
    default = LossMetric.MODEL_LOSS if goal and has_gradients else LossMetric.OUTPUT_ENERGY
    found = LossMetric(by_target or loss_metric or default)
    if found is LossMetric.MODEL_LOSS and not has_gradients:
        raise UsageError(
            "a plan by the loss of the model needs moments with its gradients; collect them with loss=… "
            "(ks.collect_input_moments)"
        )
    return found


def allocate(candidates: Sequence[Candidates], goal: Goal, rank_multiple: int, selection: Selection) -> ModelPlan:
    """Choose a chain and a rank for every layer, or leave it dense.

    With a budget, minimise Σ loss such that Σ parameters ≤ budget · Σ m n. With a target, minimise Σ parameters such
    that the mean relative loss, or Σ loss increase, is at most the target. The losses are `Candidates.losses`, upper
    bounds, those of the best known chains; a dense layer loses nothing and has m n parameters. No plan is worse than
    the same fraction in every layer.

    Args:
        candidates: of every layer, in one metric, which is that of the target.
        goal: of the plan.
        rank_multiple: as in `plan_model`.
        selection: from which the weights are.
    Raises:
        UsageError: a budget below the smallest options, or a negative target.
    """
    objective, value = goal
    layers = [_Options(entry, rank_multiple) for entry in candidates]
    costs, losses = [layer.parameters for layer in layers], [layer.losses for layer in layers]
    if objective is Objective.BUDGET:
        dense = sum(layer.entry.dense.parameters for layer in layers)
        uniform = [layer.best_within(value) for layer in layers]
        choice = choose(costs, losses, value * dense, uniform)
        if choice is None:
            least = sum(cost.min() for cost in costs) / dense
            raise UsageError(
                f"a budget of {value:g}: the smallest chains have {least:.2%} of the dense parameters; give at least "
                f"{np.ceil(least * 1e4) / 1e4:g}"
            )
    else:
        limit = value * len(layers) if objective is Objective.TARGET else value
        uniform = _smallest_uniform(layers, limit)
        choice = choose(losses, costs, limit, uniform)
        if choice is None:
            raise UsageError(f"a target of {value:g}: at least 0 is needed")
    options, gap = choice
    return ModelPlan(
        layers=tuple(layer.plan(option) for layer, option in zip(layers, options)),
        objective=objective,
        value=value,
        gap=gap,
        uniform=tuple(layer.plan(option) for layer, option in zip(layers, uniform)),
        rank_multiple=rank_multiple,
        checkpoint=selection.source,
        coverage=selection.coverage,
        loss_metric=candidates[0].loss_metric,
        unit=candidates[0].unit,
    )


class _Options:
    """The options of one layer: every rank of every family, and dense as the last one, which has no `chosen`."""

    def __init__(self, entry: Candidates, rank_multiple: int):
        pairs = [(floors, floors.ranks[floors.ranks % rank_multiple == 0]) for floors in entry.floors]
        self.entry = entry
        self.chosen = [(floors, int(rank)) for floors, ranks in pairs for rank in ranks]
        parameters = (floors.parameters[ranks - 1] for floors, ranks in pairs)
        self.parameters = np.concatenate([*parameters, [entry.dense.parameters]])
        self.losses = np.concatenate([*(entry.losses(floors)[ranks] for floors, ranks in pairs), [0.0]])

    def best_within(self, fraction: float) -> int:
        """Return the option with the least loss and at most this fraction of the dense parameters, or the smallest."""
        fitting = np.flatnonzero(self.parameters <= fraction * self.entry.dense.parameters * (1 + COST_ROUNDING))
        return int(fitting[self.losses[fitting].argmin()] if len(fitting) else self.parameters.argmin())

    def plan(self, option: int) -> LayerPlan:
        """Return an option as a plan."""
        return self.entry.plan(*self.chosen[option]) if option < len(self.chosen) else self.entry.dense


def _smallest_uniform(layers: Sequence[_Options], limit: float) -> list[int]:
    """Return the options of the smallest fraction, the same in every layer, at which the total loss is low enough."""
    fractions = np.unique(np.concatenate([layer.parameters / layer.entry.dense.parameters for layer in layers]))

    def suffices(fraction: float) -> bool:
        return sum(layer.losses[layer.best_within(fraction)] for layer in layers) <= limit

    # at a fraction of 1, all layers are dense
    smallest = fractions[bisect.bisect_left(fractions[:-1], True, key=suffices)]
    return [layer.best_within(smallest) for layer in layers]
