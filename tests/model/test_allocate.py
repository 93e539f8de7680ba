"""The plan of a model: within its budget or target, and never worse than the same fraction in every layer."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from conftest import refusal
from measured import measured_moments

import ks
from ks.chain.patterns import make_chain
from ks.errors import UsageError
from ks.model.allocate import allocate, goal_of, plan_metric
from ks.model.candidates import find_candidates
from ks.model.layer_weights import select_weights
from ks.model.model_plan import ModelPlan, Objective
from ks.moments.metric import DAMPING, LossMetric


def weight(rows, cols, decay, seed):
    """Return a weight whose singular values fall like k^-decay."""
    left, _, right = torch.linalg.svd(torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)))
    values = torch.arange(1, min(rows, cols) + 1, dtype=torch.float32) ** -decay
    return left[:, : len(values)] * values @ right[: len(values)]


WEIGHTS = {
    "hard.weight": weight(24, 32, 0.1, 0),
    "easy.weight": 3 * weight(32, 24, 2.0, 1),
    "middling.weight": weight(16, 16, 0.7, 2),
}


MOMENTS = measured_moments(WEIGHTS)
SELECTION = select_weights(WEIGHTS)


@pytest.fixture(scope="module", params=LossMetric)
def candidates(request):
    families = ["monarch", "lowrank"]
    return find_candidates(SELECTION.weights, make_chain, families, MOMENTS, loss_metric=request.param)


def plan_of(candidates, objective, value, rank_multiple=1):
    return allocate(candidates, (Objective(objective), value), rank_multiple, SELECTION)


def loss_of(plan):
    """The loss that a plan minimises, a sum over its layers."""
    if plan.loss_metric is LossMetric.MODEL_LOSS:
        return plan.loss_increase
    return plan.mean_relative_loss * len(plan.layers)


def combinations(candidates):
    """Parameters and loss of every choice of chains."""
    options = [
        [(entry.dense.parameters, 0.0)]
        + [
            (floors.chain.parameters(int(rank)), entry.losses(floors)[rank])
            for floors in entry.floors
            for rank in floors.ranks
        ]
        for entry in candidates
    ]
    for picks in itertools.product(*options):
        yield sum(cost for cost, _ in picks), sum(loss for _, loss in picks)


@pytest.mark.parametrize("budget", [0.15, 0.45, 1.0])
def test_a_budget_is_kept_with_the_least_loss_up_to_the_gap(candidates, budget):
    plan = plan_of(candidates, "budget", budget)
    least = min(loss for cost, loss in combinations(candidates) if cost <= budget * plan.dense_parameters)
    assert plan.share <= budget
    assert loss_of(plan) * (1 - plan.gap) <= least * (1 + 1e-9) <= loss_of(plan) * (1 + 2e-9)
    assert loss_of(plan) <= loss_of(plan.as_uniform()) * (1 + 1e-12)
    assert plan.unit == "nats"
    if budget == 1:
        assert {layer.family for layer in plan.layers} == {"dense"}


@pytest.mark.parametrize("fraction", [0.5, 0.01])
def test_a_target_is_met_with_the_fewest_parameters_up_to_the_gap(candidates, fraction):
    limit = fraction * sum(entry.losses(entry.floors[0])[0] for entry in candidates)  # rank 0 loses everything
    if candidates[0].loss_metric is LossMetric.MODEL_LOSS:
        plan = plan_of(candidates, "target_loss_increase", limit)
    else:
        plan = plan_of(candidates, "target", fraction)  # the mean over the layers
    fewest = min(cost for cost, loss in combinations(candidates) if loss <= limit)
    assert loss_of(plan) <= limit * (1 + 1e-9)
    assert loss_of(plan.as_uniform()) <= limit * (1 + 1e-9)
    assert plan.parameters * (1 - plan.gap) <= fewest * (1 + 1e-9)
    assert fewest <= plan.parameters <= plan.as_uniform().parameters
    assert fraction < 0.5 or plan.as_uniform().share < 0.9


def test_a_plan_in_each_metric_is_the_better_one_in_its_own():
    plan = partial(ks.plan_model, WEIGHTS, budget=0.4, moments=MOMENTS, chains=["lowrank"], quiet=True)
    energy, loss = plan(loss_metric="output_energy"), plan()
    assert (energy.loss_metric, loss.loss_metric) == tuple(LossMetric)
    assert loss.loss_increase < energy.loss_increase * 0.99
    assert energy.mean_relative_loss < loss.mean_relative_loss * 0.99
    assert energy.loss_increase_lower is loss.mean_relative_loss_lower is None
    assert loss.loss_increase_lower <= loss.loss_increase


METRICS = [
    ((None, None, None), None, False, "output_energy"),
    ((None, None, None), None, True, "output_energy"),
    ((0.5, None, None), None, False, "output_energy"),
    ((0.5, None, None), None, True, "model_loss"),
    ((0.5, None, None), "output_energy", True, "output_energy"),
    ((None, None, None), "model_loss", True, "model_loss"),
    ((None, 0.5, None), None, True, "output_energy"),
    ((None, None, 0.5), None, True, "model_loss"),
]


@pytest.mark.parametrize(("goal", "loss_metric", "gradients", "metric"), METRICS)
def test_the_metric_follows_from_target_and_gradients(goal, loss_metric, gradients, metric):
    moments = MOMENTS if gradients else dataclasses.replace(MOMENTS, gradients={})
    assert plan_metric(loss_metric, moments, goal_of(*goal)) == metric


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a plan needs a goal: give budget, target_relative_loss or target_loss_increase"),
        ({"budget": 0.5, "target_relative_loss": 0.5}, "budget together with target_relative_loss: give one or the"),
        ({"budget": 0.5, "loss_metric": "energy"}, "'energy': output_energy or model_loss is possible"),
        ({"loss_metric": "model_loss", "target_relative_loss": 0.5}, "a target for output_energy together with"),
        ({"loss_metric": "output_energy", "target_loss_increase": 0.5}, "a target for model_loss together with"),
        ({"target_loss_increase": 0.5}, "needs moments with its gradients"),
        ({"target_relative_loss": -0.5}, "a target of -0.5: at least 0 is needed"),
    ],
)
def test_a_goal_that_is_not_possible_is_refused(arguments, message):
    moments = dataclasses.replace(MOMENTS, gradients={})
    with refusal(message):
        ks.plan_model(WEIGHTS, moments=moments, chains=["lowrank"], quiet=True, **arguments)


@pytest.mark.parametrize("loss_metric", [None, *LossMetric])
def test_planned_losses_are_those_of_the_factorised_weights(loss_metric):
    options = {"moments": MOMENTS, "loss_metric": loss_metric, "chains": ["lowrank"]} if loss_metric else {}
    planned = ks.plan_model(WEIGHTS, budget=0.4, quiet=True, **options).layers
    assert any(layer.chain for layer in planned)
    for layer in planned:
        if layer.chain is None:
            continue
        weight, gradients = WEIGHTS[layer.layer].double(), MOMENTS.gradients[layer.layer].second_moment
        inputs = MOMENTS.second_moment(layer.layer) if loss_metric else torch.eye(layer.cols).double()
        metric = ks.Metric(inputs, gradients if loss_metric is LossMetric.MODEL_LOSS else None)
        chain = ks.KSLinear.from_dense(WEIGHTS[layer.layer], patterns=layer.patterns, metric=metric)
        error = weight - chain.to_dense().detach().double()
        lost = (error @ inputs @ error.mT).trace() / (weight @ inputs @ weight.mT).trace()
        assert layer.relative_loss == pytest.approx(lost.item(), rel=1e-3, abs=1e-6)
        assert layer.parameters == chain.num_parameters
        if loss_metric:
            damped = (1 - DAMPING) * gradients + DAMPING * gradients.diagonal().mean() * torch.eye(layer.rows)
            most = max(sums.count for sums in MOMENTS.gradients.values())
            seen = MOMENTS.gradients[layer.layer].count / most  # increases are per token of the layer that sees most
            increase = seen * (damped @ error @ inputs @ error.mT).trace() / 2
            assert layer.loss_increase == pytest.approx(increase.item(), rel=1e-3, abs=1e-9)


def test_ranks_are_multiples(candidates):
    plan = plan_of(candidates, "budget", 0.7, rank_multiple=5)
    assert any(layer.rank for layer in plan.layers)
    assert all(layer.rank is None or layer.rank % 5 == 0 for layer in plan.layers)


def test_a_fraction_admits_the_chain_that_has_it():
    """63 / 104 · 104 is below 63 in floating point."""
    [entry] = find_candidates(select_weights({"a": weight(8, 13, 0.5, 0)}).weights, make_chain, ["lowrank"])
    plan = plan_of([entry], "target", entry.floors[0].upper[3] * 1.001)
    assert plan.as_uniform().parameters == plan.parameters == 63


def test_the_least_budget_that_the_message_gives_is_enough(candidates):
    with pytest.raises(UsageError) as error:
        plan_of(candidates, "budget", 0.01)
    least = float(str(error.value).rpartition("at least ")[2])
    assert plan_of(candidates, "budget", least).share <= least


def test_one_call_plans_a_file_and_a_model(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(WEIGHTS, path)
    plan = ks.plan_model(path, "*.weight", budget=0.5, floors_path=tmp_path / "floors.npz", quiet=True)
    assert plan.checkpoint == "model.pth"
    plan.save(tmp_path / "plan.json")
    assert ModelPlan.load(tmp_path / "plan.json") == plan
    model = torch.nn.ModuleDict({"hard": torch.nn.Linear(32, 24), "easy": torch.nn.Linear(24, 32)})
    with torch.no_grad():
        model["hard"].weight.copy_(WEIGHTS["hard.weight"])
        model["easy"].weight.copy_(WEIGHTS["easy.weight"])
    same = ks.plan_model(model, "*", budget=0.5, quiet=True)
    assert {layer.weight_sha256 for layer in same.layers} < {layer.weight_sha256 for layer in plan.layers}
