"""Tiny models with plans for them, made without the optimisation; the peak memory of loading one."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from networks import normal
from torch import nn

from ks.chain.patterns import make_chain
from ks.files.weights import tensors_sha256
from ks.model.layer_plan import LayerPlan
from ks.model.model_plan import ModelPlan
from ks.moments.read import inputs_of


def layer_plan(name, weight, family="lowrank", rank=2, moments=None, **more):
    """The plan of a weight (m, n): a chain of a rank, or dense without a family."""
    rows, cols = weight.shape
    chain = make_chain(rows, cols, family) if family else None
    given = inputs_of(moments, cols, name) if moments and chain else None
    loss = 0.5 if chain else 0.0
    return LayerPlan(
        name,
        rows,
        cols,
        tensors_sha256(weight.detach()),
        chain,
        rank if chain else None,
        loss,
        loss,
        weight.element_size(),
        inputs_sha256=given.sha256 if given else None,
        gradients_sha256=given.gradients_sha256 if given else None,
        **more,
    )


def plan_of(model, families=None, moments=None, **ranks):
    """A plan for nn.Linear layers of a model: all of them low-rank, or those of `families`, name → family or None."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    families = dict.fromkeys(names, "lowrank") if families is None else families
    layers = [
        layer_plan(f"{name}.weight", model.get_submodule(name).weight, family, ranks.get(name, 2), moments)
        for name, family in families.items()
    ]
    return ModelPlan(tuple(layers), "budget", 0.5, checkpoint="model.safetensors")


def single(name, weight, **more):
    """The plan of one weight."""
    return ModelPlan((layer_plan(name, weight, **more),), "budget", 0.5)


def tied_plan(model):
    """A plan for `Tied`."""
    first = layer_plan("first.weight", model.first.weight, shared_with=("second.weight",))
    return ModelPlan((first, layer_plan("third.weight", model.third.weight, "monarch", 1)), "budget", 0.5)


class Network(nn.Module):
    """Two blocks; the second layer of each block has no bias. `normal` makes the values the same in every process."""

    def __init__(self, width=8, inner=12):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, inner), "down": nn.Linear(inner, width, bias=False)})
            for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(width)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=index))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.norm(x)


class Tied(nn.Module):
    """Two layers with one weight and biases of their own, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.third = self.fourth = nn.Linear(8, 8)

    def forward(self, x):
        return self.fourth(torch.relu(self.third(self.second(torch.relu(self.first(x))))))


def bits(model):
    """Dtype and values of everything in the state of a model."""
    return {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        dtype == other[name][0] and torch.equal(value, other[name][1]) for name, (dtype, value) in one.items()
    )


FAMILIES = {"blocks.0.up": "lowrank", "blocks.0.down": "monarch", "blocks.1.up": None}


def peak_mib(load) -> float:
    """The memory that a call takes at its peak, in a fork of this process, which has the libraries."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_peak_mib, load).result()


def _peak_mib(load) -> float:
    def status(name) -> float:
        return int(re.search(name + r":\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    before = status("VmRSS")
    load()
    return status("VmHWM") - before
