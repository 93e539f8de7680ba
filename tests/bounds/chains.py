"""Random chains and weights, and the loss of a chain by its definition: shared by the tests of the bounds."""

import random
from math import prod

import torch

from ks.chain.patterns import Chain
from ks.chain.reference import chain_to_dense
from ks.moments.metric import Metric

SEEDS = range(40)


def random_chain(seed, length=None):
    generator = random.Random(seed)
    length = length or generator.randint(2, 4)
    rows, cols = ([generator.randint(1, 5) for _ in range(length)] for _ in range(2))
    return Chain("explicit", prod(rows), prod(cols), tuple(rows), tuple(cols))


def random_weight(chain, seed=0):
    return torch.randn(chain.rows, chain.cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(weight, values, metric=None):
    """Return tr(G E C Eᵀ) / m by its definition."""
    metric, error = metric or Metric(), weight - chain_to_dense(values)
    gradients, moment = metric.outputs.matrix_of(weight.shape[0]), metric.inputs.matrix_of(weight.shape[1])
    return (gradients @ error @ moment @ error.mT).trace().item() / len(weight)


def trained(weight, patterns, metric, seed=0, steps=100):
    """Return the loss of a chain that L-BFGS trains from a random start."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(*pattern, dtype=torch.float64, generator=generator) for pattern in patterns]
    values = [(value / pattern.c**0.5).requires_grad_() for value, pattern in zip(values, patterns)]
    optimizer = torch.optim.LBFGS(values, max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-14)
    gradients, moment = metric.outputs.matrix_of(weight.shape[0]), metric.inputs.matrix_of(weight.shape[1])
    unit = metric.loss(weight)

    def closure():
        optimizer.zero_grad()
        error = weight - chain_to_dense(values)
        value = ((gradients @ error @ moment) * error).sum() / unit
        value.backward()
        return value

    optimizer.step(closure)
    return loss(weight, [value.detach() for value in values], metric)
