"""Which layers of a model a chain may replace: those that compute x Wᵀ + b with their weight and bias alone."""

from functools import partial

import pytest
import torch
from conftest import refusal
from networks import Conv1D
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import ks
from ks.model.layer_weights import select_weights
from ks.model.linears import refusals


def linear():
    return nn.Linear(8, 6)


def plain(layer, x):
    return nn.functional.linear(x, layer.weight, layer.bias)


def of_class(name, forward):
    return type(name, (nn.Linear,), {"forward": forward})(8, 6)


def patched(forward):
    layer = linear()
    layer.forward = partial(forward, layer)
    return layer


def adapted():
    layer = of_class("Adapter", lambda layer, x: plain(layer, x) + x @ layer.up.T)
    layer.up = nn.Parameter(torch.zeros(6, 8))  # an adapter starts without an effect
    return layer


MORE = {
    "adapter": (adapted, r"it has tensors of its own \(up\)"),
    "activation": (
        lambda: of_class("Activated", lambda layer, x: plain(layer, x).relu()),
        "forward pass of its class, Activated, does not compute",
    ),
    "dropout": (
        lambda: of_class("Dropping", lambda layer, x: plain(layer, nn.functional.dropout(x, 0.5, layer.training))),
        "does not compute",
    ),
    "two outputs": (lambda: of_class("Pair", lambda layer, x: (plain(layer, x), None)), "does not compute"),
    "patched": (lambda: patched(lambda layer, x: 3 * plain(layer, x)), "does not compute"),
    "pruned weight": (lambda: prune.l1_unstructured(linear(), "weight", 0.3), "its weight is computed"),
    "pruned bias": (lambda: prune.l1_unstructured(linear(), "bias", 0.3), "its bias is computed"),
    "weight norm": (lambda: parametrizations.weight_norm(linear()), "its weight is computed"),
    "parametrised bias": (
        lambda: parametrize.register_parametrization(linear(), "bias", nn.Tanh()),
        "its bias is computed",
    ),
    "lazy": (lambda: nn.LazyLinear(6), "a lazy layer without values"),
}


@pytest.mark.parametrize("make", [*MORE])
def test_a_layer_that_is_more_is_left_out_of_the_plan_with_the_reason(make):
    layer, reason = MORE[make]
    model = nn.ModuleDict({"more": layer(), "plain": linear()})
    assert [*refusals(model)] == ["more.weight"]
    found = select_weights(model)
    assert [weight.name for weight in found.weights] == ["plain.weight"]
    (note,) = found.notes
    assert note.startswith("skipped more.weight: ")
    with refusal(reason):
        select_weights(model, "more")


HARMLESS = {
    "plain": linear,
    "casting": lambda: of_class(
        "Casting", lambda layer, x: nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias)
    ),
    "initialised": lambda: type("Initialised", (nn.Linear,), {"reset_parameters": lambda layer: None})(8, 6),
    "patched": lambda: patched(plain),
    "Conv1D": lambda: Conv1D(6, 8),
}


@pytest.mark.parametrize("layer", HARMLESS.values(), ids=[*HARMLESS])
def test_a_harmless_subclass_may_be_replaced(layer):
    assert refusals(nn.Sequential(layer())) == {}


def test_a_weight_with_other_users_is_left_out():
    model = nn.ModuleDict(
        {"table": nn.Embedding(12, 8), "head": nn.Linear(8, 12), "attention": nn.MultiheadAttention(8, 2)}
    )
    model["head"].weight = model["table"].weight
    assert refusals(model) == {
        "head.weight": "table (Embedding) uses it too",
        "attention.out_proj.weight": "nn.MultiheadAttention uses it without calling its layer",
    }


def test_a_chain_takes_over_the_hooks_of_its_layer():
    weight = torch.outer(torch.arange(6.0), torch.arange(8.0))  # of rank 1
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(5, 8)
    model[0].weight.data = weight
    model[0].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    model[0].register_forward_hook(lambda module, inputs, named, output: output + 3, with_kwargs=True)
    expected = model(x)
    small = ks.compress(model, ks.plan_model(model, budget=0.3, chains=["lowrank"], quiet=True), quiet=True)
    assert isinstance(small[0], ks.KSLinear)
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-4)
