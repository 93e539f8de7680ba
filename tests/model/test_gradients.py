"""Collected gradients at the outputs of layers against autograd, for models of every kind; the model stays as it was."""

import contextlib

import pytest
import torch
from networks import Attention, hand_computed, normal
from torch.utils.checkpoint import checkpoint

import ks
from ks.errors import UsageError

LAYER = "encoder.layer.0"
ALL = "encoder.**"


def squares(output, batch):
    return output.square().sum()


def collect(model, batches, layers=ALL, loss=squares, **options):
    return ks.collect_input_moments(model, batches, layers, loss=loss, quiet=True, **options)


def agrees(sums, rows, rtol=1e-5):
    square, total = hand_computed(rows)
    torch.testing.assert_close(sums.sum_xx, square, rtol=rtol, atol=rtol * square.abs().max().item())
    torch.testing.assert_close(sums.sum_x, total, rtol=rtol, atol=rtol * total.abs().max().item())
    assert sums.count == rows.numel() // rows.shape[-1]


def gradients_of(model, x, loss=squares):
    """g at the output of every layer, by torch.autograd.grad of a model whose parameters require gradients."""
    outputs = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    hooks = [
        module.register_forward_hook(lambda module, x, y, name=name: outputs.setdefault(name, []).append(y))
        for name, module in layers.items()
    ]
    value = loss(model(x), x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(torch.autograd.grad(value, each, retain_graph=True)) for name, each in outputs.items()}


def test_the_gradients_are_those_of_autograd():
    model, x = Attention().eval(), normal(4, 3, 6)
    found = collect(model, [x[:2], x[2:]], held_out=0.5)
    expected, unseen = gradients_of(model, x[:2]), gradients_of(model, x[2:])
    assert set(found.gradients) == set(found.held_out_gradients) == set(found.aliases)
    for name in expected:
        agrees(found.gradients[f"{name}.weight"], expected[name])
        agrees(found.held_out_gradients[f"{name}.weight"], unseen[name])
    assert (found.loss, found.unit) == ("squares", "nats")
    without = ks.collect_input_moments(model, [x[:2], x[2:]], ALL, held_out=0.5, quiet=True)
    assert without.loss == "" and without.gradients == {}
    for name, sums in without.train.items():
        assert torch.equal(found.train[name].sum_xx, sums.sum_xx)
