"""The plan of a model: within its budget or target, and never worse than the same fraction in every layer."""

import copy
import itertools
from functools import partial

import pytest
import torch
from measured import measured_moments

import ks
from ks.chain.patterns import make_chain
from ks.errors import UsageError
from ks.model.allocate import allocate, plan_metric
from ks.model.candidates import find_candidates
from ks.model.layer_weights import select_weights
from ks.model.model_plan import ModelPlan
from ks.moments.metric import LossMetric


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


@pytest.fixture(scope="module")
def candidates():
    return find_candidates(select_weights(WEIGHTS).weights, make_chain, ["monarch", "lowrank"])


@pytest.mark.parametrize("budget", [0.15, 0.45, 1.0])
def test_a_budget_is_kept_and_beats_the_same_fraction_everywhere(candidates, budget):
    plan = allocate(candidates, budget=budget)
    assert plan.share <= budget
    assert plan.mean_relative_loss <= plan.as_uniform().mean_relative_loss + 1e-12
    if budget == 1:
        assert {layer.family for layer in plan.layers} == {"dense"}


@pytest.mark.parametrize("target", [0.5, 0.05, 0.001])
def test_a_target_is_met_with_no_more_parameters_than_the_same_fraction_everywhere(candidates, target):
    plan = allocate(candidates, target_relative_loss=target)
    assert plan.mean_relative_loss <= target * (1 + 1e-9)
    assert plan.as_uniform().mean_relative_loss <= target * (1 + 1e-9)
    assert target < 0.5 or plan.as_uniform().share < 0.9
    assert target < 0.5 or plan.mean_relative_loss > target / len(WEIGHTS)
    assert plan.parameters <= plan.as_uniform().parameters


def test_no_plan_saves_more_than_the_gap(candidates):
    budget = 0.45
    options = [
        [
            (floors.chain.parameters(rank), loss)
            for floors in entry.floors
            for rank, loss in enumerate(floors.upper)
            if rank
        ]
        + [(entry.dense.parameters, 0.0)]
        for entry in candidates
    ]
    capacity = budget * sum(entry.dense.parameters for entry in candidates)
    best = min(
        sum(loss for _, loss in picks)
        for picks in itertools.product(*options)
        if sum(cost for cost, _ in picks) <= capacity
    )
    plan = allocate(candidates, budget=budget)
    assert plan.mean_relative_loss * (1 - plan.gap) <= best / 3 * (1 + 1e-9)
    assert best / 3 <= plan.mean_relative_loss * (1 + 1e-9)


@pytest.fixture(scope="module")
def moments():
    return measured_moments(WEIGHTS)


@pytest.fixture(scope="module")
def by_loss():
    tiny = {"a.weight": weight(8, 12, 0.1, 0), "b.weight": weight(12, 8, 2.0, 1), "c.weight": weight(8, 8, 0.7, 2)}
    return find_candidates(
        select_weights(tiny).weights,
        partial(make_chain, blocks=2),
        ["monarch", "lowrank"],
        measured_moments(tiny),
        loss_metric=LossMetric.MODEL_LOSS,
    )


def combinations(candidates):
    """Parameters and increase of the loss of the model of every combination of chains, and of every target."""
    options = []
    for entry in candidates:
        plans = [entry.plan(floors, int(rank)) for floors in entry.floors for rank in floors.ranks]
        options.append([(plan.parameters, plan.loss_increase) for plan in (entry.dense, *plans)])
    for picks in itertools.product(*options):
        yield sum(cost for cost, _ in picks), sum(loss for _, loss in picks)


@pytest.mark.parametrize("budget", [0.3, 0.45, 0.7])
def test_a_plan_by_the_loss_of_the_model_is_the_best_of_all_combinations(by_loss, budget):
    plan = allocate(by_loss, budget=budget)
    least = min(loss for cost, loss in combinations(by_loss) if cost <= budget * plan.dense_parameters)
    assert plan.loss_increase == pytest.approx(least, rel=1e-9)
    assert plan.loss_increase == pytest.approx(sum(layer.loss_increase for layer in plan.layers))
    assert plan.loss_increase <= plan.as_uniform().loss_increase * (1 + 1e-12)
    assert plan.unit == "nats"


def test_a_target_for_the_loss_of_the_model_takes_the_fewest_parameters(by_loss):
    zero = sum(entry.floors[0].energy / 2 for entry in by_loss)
    for target in (0.3 * zero, 0.01 * zero):
        plan = allocate(by_loss, target_loss_increase=target)
        fewest = min(cost for cost, loss in combinations(by_loss) if loss <= target)
        assert plan.loss_increase <= target * (1 + 1e-9)
        assert plan.parameters * (1 - plan.gap) <= fewest * (1 + 1e-9)
        assert fewest <= plan.parameters
        assert plan.parameters <= plan.as_uniform().parameters


def test_a_plan_in_each_metric_is_the_better_one_in_its_own(moments):
    plan = partial(ks.plan_model, WEIGHTS, budget=0.4, moments=moments, chains=["lowrank"], quiet=True)
    energy, loss = plan(loss_metric="output_energy"), plan()
    assert (energy.loss_metric, loss.loss_metric) == tuple(LossMetric)
    assert loss.loss_increase < energy.loss_increase * 0.99
    assert energy.mean_relative_loss < loss.mean_relative_loss * 0.99
    assert energy.loss_increase_lower is loss.mean_relative_loss_lower is None
    assert loss.loss_increase_lower <= loss.loss_increase


METRICS = [
    ({}, False, "output_energy"),
    ({}, True, "output_energy"),
    ({"budget": 0.5}, False, "output_energy"),
    ({"budget": 0.5}, True, "model_loss"),
    ({"budget": 0.5, "loss_metric": "output_energy"}, True, "output_energy"),
    ({"loss_metric": "model_loss"}, True, "model_loss"),
    ({"target_relative_loss": 0.5}, True, "output_energy"),
    ({"target_loss_increase": 0.5}, True, "model_loss"),
]


@pytest.mark.parametrize(("arguments", "gradients", "metric"), METRICS)
def test_the_metric_follows_from_target_and_gradients(moments, arguments, gradients, metric):
    given = moments if gradients else measured_moments(WEIGHTS, WEIGHTS)
    assert plan_metric(**({"loss_metric": None} | arguments), moments=given) == metric


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_metric": "energy"}, "'energy': output_energy or model_loss is possible"),
        ({"loss_metric": "model_loss", "target_relative_loss": 0.5}, "is a target for output_energy; leave out"),
        ({"loss_metric": "output_energy", "target_loss_increase": 0.5}, "is a target for model_loss; leave out"),
        ({"loss_metric": "model_loss", "budget": 0.5}, "needs moments with its gradients"),
        ({"target_loss_increase": 0.5}, "needs moments with its gradients"),
        ({"target_relative_loss": -0.5}, "a target of -0.5: at least 0 is needed"),
    ],
)
def test_a_metric_that_is_not_possible_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        ks.plan_model(WEIGHTS, moments=measured_moments(WEIGHTS, WEIGHTS), chains=["lowrank"], quiet=True, **arguments)


def test_planned_losses_are_those_of_the_factorised_weights(candidates):
    for layer in allocate(candidates, budget=0.5).layers:
        dense = WEIGHTS[layer.layer]
        if layer.chain is not None:
            chain = ks.KSLinear.from_dense(dense, patterns=layer.chain.patterns(layer.rank))
            assert chain.num_parameters == layer.parameters
            loss = (dense - chain.to_dense()).square().sum() / dense.square().sum()
            assert loss.item() == pytest.approx(layer.relative_loss, rel=1e-3, abs=1e-6)


def test_planned_increases_of_the_loss_are_those_of_the_compressed_model(moments):
    model = torch.nn.ModuleDict({name[:-7]: torch.nn.Linear(*weight.shape[::-1]) for name, weight in WEIGHTS.items()})
    with torch.no_grad():
        for name, weight in WEIGHTS.items():
            model[name[:-7]].weight.copy_(weight)
    for loss_metric in LossMetric:
        options = {"chains": ["lowrank"], "loss_metric": loss_metric, "quiet": True}
        plan = ks.plan_model(model, budget=0.4, moments=moments, **options)
        small = ks.compress(copy.deepcopy(model), plan, moments=moments, quiet=True)
        for layer in plan.layers:
            error = WEIGHTS[layer.layer] - _dense(small[layer.layer[:-7]])
            inputs, gradients = moments.train[layer.layer].second_moment, moments.gradients[layer.layer].second_moment
            damped = 0.9 * gradients + 0.1 * gradients.diagonal().mean() * torch.eye(len(gradients))
            error = error.detach().double()
            increase = (damped @ error @ inputs @ error.mT).trace() / 2
            assert layer.loss_increase == pytest.approx(increase.item(), rel=1e-3, abs=1e-9)
            energy = WEIGHTS[layer.layer].double()
            lost = (error @ inputs @ error.mT).trace() / (energy @ inputs @ energy.mT).trace()
            assert layer.relative_loss == pytest.approx(lost.item(), rel=1e-3, abs=1e-9)


def _dense(layer):
    return layer.to_dense() if isinstance(layer, ks.KSLinear) else layer.weight


def test_ranks_are_multiples(candidates):
    plan = allocate(candidates, budget=0.7, rank_multiple=5)
    assert any(layer.rank for layer in plan.layers)
    assert all(layer.rank is None or layer.rank % 5 == 0 for layer in plan.layers)


@pytest.mark.parametrize("arguments", [{}, {"budget": 0.5, "target_relative_loss": 0.5}])
def test_a_plan_has_either_a_budget_or_a_target(candidates, arguments):
    with pytest.raises(UsageError, match="either a budget or a target"):
        allocate(candidates, **arguments)


def test_a_budget_that_is_too_small_is_refused_with_one_that_is_enough(candidates):
    with pytest.raises(UsageError, match=r"the smallest chains have .*% of the dense parameters; give at") as error:
        allocate(candidates, budget=0.01)
    least = float(str(error.value).rpartition("at least ")[2])
    assert allocate(candidates, budget=least).share <= least


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
