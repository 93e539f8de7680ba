"""Sequential calibration: each layer is made for the inputs that the chains before it cause."""

import copy
import dataclasses
import itertools

import pytest
import torch
from conftest import refusal
from measured import measured_moments
from networks import Calls, normal
from planned import Network, Tied, layer_plan, plan_of
from torch import nn

import ks
from ks.bounds.factorize import factorize
from ks.model.model_plan import ModelPlan

NAMES = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
X = normal(60, 8) * torch.linspace(0.2, 2, 8)
BATCHES = [X[:30], X[30:]]


def plan_for(model):
    return plan_of(model, dict.fromkeys(NAMES, "lowrank"))


def seen_by(model, name):
    """The inputs of a layer, by a hook."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for batch in BATCHES:
            model.eval()(batch)
    handle.remove()
    return torch.cat(seen)


def second_moment(rows):
    return rows.double().t() @ rows.double() / len(rows)


def test_every_layer_is_made_for_the_inputs_that_the_chains_before_it_cause(tmp_path):
    model, dense = Network(), Network()
    plan_for(model).save(tmp_path / "x_plan.json")
    ks.compress_in_order(model, tmp_path / "x_plan.json", BATCHES, quiet=True)
    for name in NAMES:
        chain = model.get_submodule(name)
        assert isinstance(chain, ks.KSLinear)
        weight = dense.get_submodule(name).weight.detach()
        expected = factorize(weight, chain.patterns, second_moment(seen_by(model, name)))
        product = (expected[0].reshape(len(weight), -1) @ expected[1].reshape(-1, weight.shape[1])).double()
        torch.testing.assert_close(chain.to_dense().double(), product, rtol=1e-3, atol=1e-4)
    moved = second_moment(seen_by(model, NAMES[2])) - second_moment(seen_by(dense, NAMES[2]))
    assert moved.norm() > 0.1


def wanted(dense, model, anchor):
    """T of the third layer, by torch.linalg.lstsq on the inputs of the third layer in both models."""
    weight = dense.get_submodule(NAMES[2]).weight.detach().double()
    x, seen = (seen_by(each, NAMES[2]).double() for each in (dense, model))
    least = torch.linalg.lstsq(seen, x @ weight.mT).solution.mT
    assert (least - weight).norm() > 0.1 * weight.norm()
    return (1 - anchor) * weight + anchor * least


@pytest.mark.parametrize("anchor", [0.5, 1.0])
def test_with_an_anchor_the_target_turns_to_the_output_of_the_dense_model(anchor):
    """A chain of full rank is the target; with anchor 1, W x is its least squares over x̃."""
    model = Network()
    plan = plan_of(model, dict.fromkeys(NAMES[:3], "lowrank"), **{NAMES[2]: 8})
    ks.compress_in_order(model, plan, BATCHES, anchor=anchor, quiet=True)
    expected = wanted(Network(), model, anchor)
    torch.testing.assert_close(model.get_submodule(NAMES[2]).to_dense().double(), expected, rtol=1e-4, atol=1e-4)


def test_a_plan_by_the_loss_of_the_model_keeps_its_gradients_and_takes_the_new_inputs():
    model = Network()
    moments = measured_moments({f"{name}.weight": model.get_submodule(name).weight.detach() for name in NAMES})
    plan = plan_of(model, dict.fromkeys(NAMES, "lowrank"), moments)
    plan = dataclasses.replace(plan, loss_metric=ks.LossMetric.MODEL_LOSS)
    ks.compress_in_order(model, plan, BATCHES, moments=moments, anchor=1.0, quiet=True)
    chain = model.get_submodule(NAMES[2])
    gradients = moments.gradients[f"{NAMES[2]}.weight"].second_moment
    metric = ks.Metric(second_moment(seen_by(model, NAMES[2])), gradients)
    expected = ks.KSLinear.from_dense(wanted(Network(), model, 1.0), patterns=chain.patterns, metric=metric)
    torch.testing.assert_close(chain.to_dense().double(), expected.to_dense(), rtol=1e-3, atol=1e-3)
    by_energy = ks.KSLinear.from_dense(wanted(Network(), model, 1.0), patterns=chain.patterns, metric=metric.inputs)
    assert not torch.allclose(by_energy.to_dense(), expected.to_dense(), rtol=1e-2, atol=1e-2)


def test_masked_tokens_do_not_move_the_target():
    batches = [{"x": X[:30]}, {"x": X[30:]}]
    padded = [{"x": torch.cat([batch["x"], 5 + normal(9, 8)])} for batch in batches]
    models = []
    for given in (batches, padded):
        model = Network()
        plan = plan_of(model, dict.fromkeys(NAMES[:3], "lowrank"), **{NAMES[2]: 8})
        mask = lambda batch: torch.arange(len(batch["x"])) < 30  # noqa: E731
        ks.compress_in_order(model, plan, given, anchor=1.0, mask=mask, quiet=True)
        models.append(model)
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, rtol=1e-3, atol=1e-3)


def test_one_pass_is_the_plan_for_the_dense_model():
    one, other = Network(), Network()
    ks.compress_in_order(one, plan_for(one), BATCHES, max_passes=1, quiet=True)
    moments = ks.collect_input_moments(other, BATCHES, NAMES, held_out=0, quiet=True)
    ks.compress(other, plan_of(other, dict.fromkeys(NAMES, "lowrank"), moments), moments=moments, quiet=True)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


@pytest.mark.parametrize(("max_passes", "calls"), [(None, 2 * 4 + 1), (2, 2 * 2 + 1), (99, 2 * 4 + 1)])
def test_the_number_of_passes(max_passes, calls):
    """The order comes from one call, on the first batch."""
    model = Network()
    count = []
    model.register_forward_hook(lambda *_: count.append(1))
    ks.compress_in_order(model, plan_for(model), iter(BATCHES), max_passes=max_passes, quiet=True)
    assert len(count) == calls


def test_layers_with_one_input_are_one_group_in_the_order_of_the_calls(capsys):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up, self.gate = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.down(torch.relu(self.gate(x)) * self.up(x))

    model, calls = Gated(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    ks.compress_in_order(model, plan_of(model), BATCHES)
    assert len(calls) == 2 * 2 + 1
    names = [line.split(": ")[0].split(" layer ")[1] for line in capsys.readouterr().err.splitlines()]
    assert sorted(names[:2]) == ["gate", "up"]
    assert names[2:] == ["down"]


def test_tied_layers_share_a_chain_and_count_once_and_dense_ones_stay(capsys):
    model = Tied()
    layers = (
        layer_plan("second.weight", model.second.weight, shared_with=("first.weight",)),
        layer_plan("third.weight", model.third.weight, None),
    )
    dense = model.second.weight.detach()
    inputs = second_moment(seen_by(copy.deepcopy(model), "second"))
    ks.compress_in_order(model, ModelPlan(layers, "budget", 0.5), BATCHES)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["1 of 1"]
    assert model.first.block_0 is model.second.block_0
    assert isinstance(model.third, nn.Linear)
    expected = factorize(dense, model.second.patterns, inputs)
    torch.testing.assert_close(model.second.factors[0].detach(), expected[0], rtol=1e-3, atol=1e-4)


def test_an_error_leaves_the_model_as_it_was():
    model, calls = Network(), itertools.count(1)

    def fail(*_):
        if next(calls) > 4:  # after the first layer was replaced
            raise RuntimeError("out of memory")

    model.register_forward_hook(fail)
    modules = list(model.modules())
    with pytest.raises(RuntimeError, match="out of memory"):
        ks.compress_in_order(model, plan_for(model), BATCHES, quiet=True)
    assert list(model.modules()) == modules


def test_passes_batches_and_layers_that_cannot_be_used_are_refused():
    model = Network()
    for options, message in (
        ({"max_passes": 0}, "max_passes 0: at least 1"),
        ({"anchor": 1.5}, "an anchor of 1.5: 0 to 1 is allowed"),
        ({"moments": measured_moments({"a": torch.ones(3, 4)})}, "minimises the output energy and needs no moments in"),
        ({"batches": []}, "no batch was given"),
    ):
        with refusal(message):
            ks.compress_in_order(model, plan_for(model), **{"batches": BATCHES, "quiet": True} | options)
    unused = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    unused.forward = lambda x: unused["used"](x)
    with refusal("the first batch does not call unused"):
        ks.compress_in_order(unused, plan_of(unused), BATCHES, quiet=True)
    assert isinstance(unused["used"], nn.Linear)


def test_tokens_that_have_no_pair_in_the_dense_model_are_refused():
    def call(layers, x):
        y = layers.first(x)
        return layers.second(y[y[:, 0] > 0])

    torch.manual_seed(0)
    model = Calls(call, 8)
    modules = [*model.modules()]
    with refusal("layer second sees other tokens in the compressed model"):
        ks.compress_in_order(model, plan_of(model), BATCHES, anchor=0.5, quiet=True)
    assert [*model.modules()] == modules
    assert not model.second._forward_pre_hooks
