"""Sequential calibration: each layer is made for the inputs that the chains before it cause."""

import copy
import itertools

import pytest
import torch
from networks import normal
from planned import Network, Tied, layer_plan, plan_of
from torch import nn

import ks
from ks.bounds.factorize import factorize
from ks.errors import UsageError
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


def anchored_to(anchor, batches=BATCHES, model=None, **options):
    """The model of `Network` with three chains before a layer whose full-rank chain is the target itself."""
    model, families = model or Network(), dict.fromkeys(NAMES[:3], "lowrank")
    plan = ModelPlan(
        tuple(
            layer_plan(f"{n}.weight", model.get_submodule(n).weight, f, 8 if n == NAMES[2] else 2)
            for n, f in families.items()
        ),
        "budget",
        0.5,
    )
    ks.compress_in_order(model, plan, batches, anchor=anchor, quiet=True, **options)
    return model


@pytest.mark.parametrize("anchor", [0.5, 1.0])
def test_with_an_anchor_the_target_turns_to_the_output_of_the_dense_model(anchor):
    """With 1 it is the least squares of W x over x̃, checked with torch.linalg.lstsq on the inputs themselves."""
    name, dense, model = NAMES[2], Network(), anchored_to(anchor)
    weight = dense.get_submodule(name).weight.detach().double()
    x, seen = (seen_by(each, name).double() for each in (dense, model))
    least = torch.linalg.lstsq(seen, x @ weight.mT).solution.mT
    assert (least - weight).norm() > 0.1 * weight.norm()
    expected = (1 - anchor) * weight + anchor * least
    torch.testing.assert_close(model.get_submodule(name).to_dense().double(), expected, rtol=1e-4, atol=1e-4)


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
    names = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert sorted(names[:2]) == ["gate", "up"]
    assert names[2:] == ["down"]


def test_tied_layers_and_dense_ones():
    model = Tied()
    layers = (
        layer_plan("second.weight", model.second.weight, shared_with=("first.weight",)),
        layer_plan("third.weight", model.third.weight, None),
    )
    dense = model.second.weight.detach()
    inputs = second_moment(seen_by(copy.deepcopy(model), "second"))
    ks.compress_in_order(model, ModelPlan(layers, "budget", 0.5), BATCHES, quiet=True)
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
    with pytest.raises(UsageError, match="max_passes 0: at least 1"):
        ks.compress_in_order(model, plan_for(model), BATCHES, max_passes=0)
    with pytest.raises(UsageError, match="no batch was given"):
        ks.compress_in_order(model, plan_for(model), [], quiet=True)
    unused = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    unused.forward = lambda x: unused["used"](x)
    with pytest.raises(UsageError, match="the first batch does not call unused"):
        ks.compress_in_order(unused, plan_of(unused), BATCHES, quiet=True)
    assert isinstance(unused["used"], nn.Linear)
