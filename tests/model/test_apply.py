"""Applying a plan: what is replaced, shared and kept, and what is refused before anything is."""

import copy
import dataclasses

import pytest
import torch
from conftest import refusal
from measured import measured_moments
from networks import Conv1D, normal
from planned import FAMILIES, Network, Tied, bits, layer_plan, plan_of, same_bits, single, tied_plan
from torch import nn

import ks
from ks.bounds.factorize import factorize
from ks.files.layout import layer_folder, run_files
from ks.model.model_plan import ModelPlan
from ks.moments.metric import LossMetric


def refused(model, plan, message, **options):
    """The model stays as it is, and the message has one line."""
    before, modules = bits(model), list(model.modules())
    with refusal(message):
        ks.compress(model, plan, quiet=True, **options)
    assert list(model.modules()) == modules
    assert same_bits(bits(model), before)


def test_planned_layers_become_chains_and_the_others_stay(tmp_path, capsys):
    model, plan = Network(), plan_of(Network(), FAMILIES)
    dense = copy.deepcopy(model)
    plan.save(tmp_path / "x_plan.json")
    assert ks.compress(model, tmp_path / "x_plan.json") is model
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("1 of 3, layer blocks.0.up: lowrank ")
    assert lines[2] == "3 of 3, layer blocks.1.up: stays dense"
    up, down = model.blocks[0]["up"], model.blocks[0]["down"]
    assert isinstance(up, ks.KSLinear)
    assert isinstance(down, ks.KSLinear)
    assert down.bias is None
    assert isinstance(model.blocks[1]["up"], nn.Linear)
    assert isinstance(model.blocks[1]["down"], nn.Linear)
    weight = dense.blocks[0]["up"].weight
    u, s, v = torch.linalg.svd(weight.double())
    torch.testing.assert_close(up.to_dense().double(), u[:, :2] * s[:2] @ v[:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(up.bias, dense.blocks[0]["up"].bias)
    planned = (*up.factors, *down.factors, model.blocks[1]["up"].weight)
    assert sum(values.numel() for values in planned) == plan.parameters
    x = normal(5, 8)
    expected = x @ up.to_dense().t() + up.bias
    torch.testing.assert_close(up(x), expected)
    assert model.eval()(x).shape == (5, 8)


def test_mode_gradients_and_dtype_stay():
    model = Network().bfloat16().eval()
    model.blocks[0]["up"].weight.requires_grad_(False)
    bias = model.blocks[0]["up"].bias
    ks.compress(model, plan_of(model, FAMILIES), quiet=True)
    up, down = model.blocks[0]["up"], model.blocks[0]["down"]
    assert up.bias is bias
    assert not up.training
    assert {factor.dtype for factor in (*up.factors, *down.factors)} == {torch.bfloat16}
    assert not any(factor.requires_grad for factor in up.factors)
    assert all(factor.requires_grad for factor in down.factors)


def test_a_model_may_hold_the_checkpoint_in_a_wider_dtype():
    narrow = Network().bfloat16()
    plan = plan_of(narrow, FAMILIES)
    model = narrow.float()
    ks.compress(model, plan, quiet=True)
    assert model.blocks[0]["up"].factors[0].dtype == torch.float32
    refused(Network(), plan, "other values")


def moments_of(model, layers="blocks.*.up"):
    return ks.collect_input_moments(model, [normal(40, 8) * torch.arange(8)], layers, held_out=0, quiet=True)


def test_measured_inputs_make_the_chain_of_the_plan(tmp_path):
    model = Network()
    moments = moments_of(model)
    plan = plan_of(model, {"blocks.0.up": "monarch"}, moments)
    moments.save(tmp_path / "m.safetensors")
    weight = model.blocks[0]["up"].weight.detach()
    ks.compress(model, plan, moments=tmp_path / "m.safetensors", quiet=True)
    chain = model.blocks[0]["up"]
    expected = factorize(weight, chain.patterns, moments.second_moment("blocks.0.up.weight"))
    for values, factor in zip(expected, chain.factors):
        torch.testing.assert_close(factor.detach(), values, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(chain.factors[0], factorize(weight, chain.patterns)[0])


def test_moments_must_be_those_of_the_plan():
    model = Network()
    moments = moments_of(model)
    plan = plan_of(model, {"blocks.0.up": "lowrank", "blocks.1.up": "lowrank"}, moments)
    refused(model, plan, "give their moments")
    other = ks.collect_input_moments(model, [normal(40, 8)], "blocks.*.up", held_out=0, quiet=True)
    refused(model, plan, "are not those of the plan", moments=other)
    refused(model, plan, "no inputs for key 'blocks.0.up.weight'", moments=moments_of(model, "blocks.1.up"))
    refused(model, plan_of(model, FAMILIES), "needs no moments", moments=moments)


def test_a_plan_by_the_loss_of_the_model_takes_its_gradients():
    model = Network()
    weights = {f"blocks.{index}.up.weight": model.blocks[index]["up"].weight.detach() for index in range(2)}
    moments = measured_moments(weights)
    plan = ks.plan_model(weights, budget=0.5, moments=moments, chains=["lowrank"], quiet=True)
    refused(model, plan, "give their moments")
    other = dataclasses.replace(moments, gradients=measured_moments(weights, seed=1).gradients)
    refused(model, plan, "the gradients at the outputs of blocks.0.up.weight are missing or not those", moments=other)
    refused(model, plan, "are missing or not those", moments=dataclasses.replace(moments, gradients={}))
    ks.compress(model, plan, moments=moments, quiet=True)
    name, weight = next(iter(weights.items()))
    metric = ks.Metric(moments.second_moment(name), moments.gradients[name].second_moment)
    expected = ks.KSLinear.from_dense(weight, patterns=plan.layers[0].patterns, metric=metric)
    torch.testing.assert_close(model.blocks[0]["up"].to_dense(), expected.to_dense())
    model = Network()
    ks.compress(model, dataclasses.replace(plan, loss_metric=LossMetric.OUTPUT_ENERGY), moments=moments, quiet=True)
    by_energy = ks.KSLinear.from_dense(weight, patterns=plan.layers[0].patterns, metric=metric.inputs).to_dense()
    torch.testing.assert_close(model.blocks[0]["up"].to_dense(), by_energy)
    assert not torch.allclose(by_energy, expected.to_dense(), rtol=1e-2, atol=1e-2)


def test_another_checkpoint_is_refused():
    plan = plan_of(Network(), FAMILIES)
    other = Network()
    with torch.no_grad():
        other.blocks[1]["up"].weight[0, 0] += 1
    refused(other, plan, "blocks.1.up.weight of the model has other values")
    refused(Network(inner=16), plan, r"shape \(16, 8\), the plan is for \(12, 8\); make a plan")
    renamed = dataclasses.replace(plan.layers[0], layer="blocks.7.up.weight")
    message = "no linear layer for key 'blocks.7.up.weight'; nearest of 4: blocks"
    refused(Network(), dataclasses.replace(plan, layers=(renamed, *plan.layers[1:])), message)
    with torch.device("meta"):
        refused_meta = Network()
    with refusal("meta tensor"):
        ks.compress(refused_meta, plan, quiet=True)


def test_a_prefix_of_the_checkpoint_is_no_obstacle():
    model = Network()
    [layer] = plan_of(model, {"blocks.0.up": "lowrank"}).layers
    ks.compress(
        model, ModelPlan((dataclasses.replace(layer, layer=f"model.{layer.layer}"),), "budget", 0.5), quiet=True
    )
    assert isinstance(model.blocks[0]["up"], ks.KSLinear)


def test_tied_weights_share_one_chain(capsys):
    model = Tied()
    x = normal(3, 8)
    dense = copy.deepcopy(model)
    plan = tied_plan(model)
    ks.compress(model, plan)
    assert "shared with the tied second" in capsys.readouterr().err
    assert all(one is other for one, other in zip(model.first.blocks, model.second.blocks))
    assert model.third is model.fourth
    assert torch.equal(model.second.bias, dense.second.bias)
    assert torch.equal(model.first.bias, dense.first.bias)
    values = {id(p): p.numel() for name, p in model.named_parameters() if "bias" not in name}
    assert sum(values.values()) == plan.parameters
    expected = x @ model.second.to_dense().t() + dense.second.bias
    torch.testing.assert_close(model.second(x), expected)
    assert model(x).shape == (3, 8)


def test_layers_that_the_model_or_the_plan_ties_share_a_chain():
    model, untied = Tied(), Tied()
    ks.compress(model, single("second.weight", model.second.weight), quiet=True)
    assert model.first.block_0 is model.second.block_0
    untied.second.weight = nn.Parameter(untied.second.weight.detach().clone())
    ks.compress(untied, tied_plan(untied), quiet=True)
    assert untied.first.block_0 is untied.second.block_0


def test_a_plan_of_two_layers_does_not_fit_a_model_that_ties_them():
    model = Tied()
    plan = ModelPlan(
        tuple(layer_plan(f"{name}.weight", model.first.weight) for name in ("first", "second")), "budget", 0.5
    )
    refused(model, plan, "first.weight and second.weight share a weight in the model")


def test_a_weight_that_an_embedding_keeps_is_refused():
    model = nn.ModuleDict({"table": nn.Embedding(12, 8), "head": nn.Linear(8, 12)})
    model["head"].weight = model["table"].weight
    plan = plan_of(model, {"head": "lowrank"})
    refused(model, plan, r"head.weight of the model cannot be replaced by a chain: table \(Embedding\) uses it too")
    kept = plan_of(model, {"head": None})
    assert ks.compress(model, kept, quiet=True)["head"].weight is model["table"].weight


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_of_torch_calls_its_chains(masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = normal(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [4], [2]]) if masked else None
    before = model(x, src_key_padding_mask=mask)
    names = ("layers.0.linear1", "layers.1.linear2")
    ks.compress(model, plan_of(model, dict.fromkeys(names, "lowrank"), **dict.fromkeys(names, 8)), quiet=True)
    with torch.no_grad():
        after = model(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    torch.testing.assert_close(after[kept], before[kept], rtol=1e-4, atol=1e-4)


def test_conv1d_of_transformers_is_replaced_by_the_chain_of_its_transpose():
    model = nn.Sequential(Conv1D(6, 8))
    weight = model[0].weight.detach().t()
    refused(model, single("0.weight", weight.t()), "plan it with --transpose")
    ks.compress(model, single("0.weight", weight, rank=6), quiet=True)
    assert model[0].stored_transposed
    x = normal(3, 8)
    torch.testing.assert_close(model(x), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_a_compiled_model_runs_its_chains():
    model = Network().eval()
    compiled = torch.compile(model, backend="eager")
    x = normal(5, 8)
    compiled(x)
    assert ks.compress(compiled, plan_of(model, FAMILIES), quiet=True) is compiled
    torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    assert isinstance(model.blocks[0]["up"], ks.KSLinear)


@pytest.fixture
def results(tmp_path):
    """The folder of a sweep over a checkpoint: plan, and a trained chain for each planned layer."""
    plan_of(Network(), FAMILIES).save(tmp_path / "rank_sweep_plan.json")
    chains = {
        "blocks.0.up": ks.KSLinear(8, 12, 2, bias=True, chain="lowrank", dtype=torch.float64),
        "blocks.0.down": ks.KSLinear(12, 8, 2),
    }
    for name, chain in chains.items():
        files = run_files(layer_folder(tmp_path, f"{name}.weight"), 2, None, None)
        files.directory.mkdir(parents=True)
        chain.save(files.best)
    return tmp_path, chains


def test_trained_chains_come_from_the_folder_of_their_sweep(results):
    folder, chains = results
    assert layer_folder(folder, "block/0.weight").parent == folder
    model, dense = Network(), Network()
    ks.compress(model, folder, quiet=True)
    for name, chain in chains.items():
        found = model.get_submodule(name)
        for values, factor in zip(chain.factors, found.factors):
            assert torch.equal(values.float(), factor)
            assert factor.stride() == values.stride()
    own, extra = dense.blocks[0]["up"].bias.double(), chains["blocks.0.up"].bias
    torch.testing.assert_close(model.blocks[0]["up"].bias, (own + extra).float())
    assert model.blocks[0]["down"].bias is None


def test_results_that_do_not_belong_to_the_plan_are_refused(results):
    folder, _ = results
    refused(Network(), folder, "need no moments", moments=moments_of(Network()))
    files = run_files(folder / "blocks.0.down.weight", 2, None, None)
    ks.KSLinear(12, 8, 1).save(files.best)
    refused(Network(), folder, "another chain than the planned one")
    files.best.unlink()
    refused(Network(), folder, "rank_2_best.pth: no such file")
    (folder / "other_plan.json").write_text("{}")
    refused(Network(), folder, "should hold one plan")
    refused(Network(), folder / "absent.json", "no such file")
