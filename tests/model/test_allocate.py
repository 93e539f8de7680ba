"""The plan of a model: within its budget or target, and never worse than the same fraction in every layer."""

import itertools

import pytest
import torch

import ks
from ks.chain.patterns import make_chain
from ks.errors import UsageError
from ks.model.allocate import allocate
from ks.model.candidates import find_candidates
from ks.model.layer_weights import select_weights
from ks.model.model_plan import ModelPlan


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


def test_planned_losses_are_those_of_the_factorised_weights(candidates):
    for layer in allocate(candidates, budget=0.5).layers:
        dense = WEIGHTS[layer.layer]
        if layer.chain is not None:
            chain = ks.KSLinear.from_dense(dense, patterns=layer.chain.patterns(layer.rank))
            assert chain.num_parameters == layer.parameters
            loss = (dense - chain.to_dense()).square().sum() / dense.square().sum()
            assert loss.item() == pytest.approx(layer.relative_loss, rel=1e-3, abs=1e-6)


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
