"""Random chains and weights, and the loss of a chain by its definition: shared by the tests of the bounds."""

import random
from math import prod

import torch

from ks.chain.patterns import Chain
from ks.chain.reference import chain_to_dense

SEEDS = range(40)


def random_chain(seed, length=None):
    generator = random.Random(seed)
    length = length or generator.randint(2, 4)
    rows, cols = ([generator.randint(1, 5) for _ in range(length)] for _ in range(2))
    return Chain("explicit", prod(rows), prod(cols), tuple(rows), tuple(cols))


def random_weight(chain, seed=0):
    return torch.randn(chain.rows, chain.cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(weight, values):
    return ((weight - chain_to_dense(values)).square().sum() / len(weight)).item()
