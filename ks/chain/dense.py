"""A chain multiplied out into its dense matrix W, block by block."""

import functools
import itertools
from collections.abc import Iterator
from itertools import pairwise

import torch

from ks.chain.bmm import float32_products
from ks.chain.merge import merge_factors
from ks.chain.patterns import Pattern, chainability
from ks.chain.product import chain_product

PIECE_VALUES = 2**18  # of W that are made at a time by blocks: they stay in a cache
COLUMN_VALUES = 2**23  # of a unit matrix that are multiplied at a time: a wide W needs little more than its own memory


@torch.no_grad()
def dense_chain(values: list[torch.Tensor]) -> torch.Tensor:
    """Return K_1 … K_L as a tensor of shape (m, n), in the dtype and on the device of the values."""
    out = values[0].new_empty(Pattern(*values[0].shape).rows, Pattern(*values[-1].shape).cols)
    for place, product in _pieces(out, values):
        place.copy_(product)
    return out


@torch.no_grad()
def subtract_chain(out: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
    """Subtract K_1 … K_L, multiplied in the dtype of `out`, from `out` in place, and return it.

    Args:
        out: shape (m, n), contiguous.
        values: shapes (a_l, b_l, c_l, d_l), output side first, any float dtype.
    """
    for place, product in _pieces(out, [factor.to(out.dtype) for factor in values]):
        place.sub_(product)
    return out


def _pieces(out: torch.Tensor, values: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield views that cover `out`, each with that part of K_1 … K_L, of the same shape."""
    patterns = [Pattern(*factor.shape) for factor in values]
    ranks = [chainability(*pair) or 0 for pair in pairwise(patterns)]
    if ranks and all(ranks) and patterns[0].a == patterns[-1].d == 1:
        cut = 1 + ranks.index(min(ranks))  # the last product costs m·n·r multiply-adds, and nearly all of the time
        with float32_products(out, "ieee"):
            left, right = (functools.reduce(merge_factors, side) for side in (values[:cut], values[cut:]))
            yield from _blocks(out, left, right)
    else:
        yield from _columns(out, values)


def _blocks(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parts of the product of two chainable factors of shapes (1, m/q, p·r, q) and (p, r·q, n/p, 1).

    They are q × p blocks of rank r, W[t::q, i·n/p:(i+1)·n/p], which cost m·n·r multiply-adds in all.
    """
    (_, height, _, q), (p, _, width, _) = left.shape, right.shape
    left = left.view(height, p, -1, q).permute(3, 1, 0, 2)  # (m/q) (p r) q -> q p (m/q) r
    right = right.reshape(p, -1, q, width).permute(2, 0, 1, 3)  # p (r q) (n/p) -> q p r (n/p)
    blocks = out.view(height, q, p, width).permute(1, 2, 0, 3)  # (m/q q) (p n/p) -> q p (m/q) (n/p)
    ranges: list[list[slice]] = []
    size = width
    for count in (height, p, q):
        step = min(count, max(1, PIECE_VALUES // size))
        ranges.insert(0, [slice(start, start + step) for start in range(0, count, step)])
        size *= count
    for t, i, rows in itertools.product(*ranges):
        yield blocks[t, i, rows], left[t, i, rows] @ right[t, i]


def _columns(out: torch.Tensor, values: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield groups of columns of any chain: its products with columns of a unit matrix."""
    features = out.shape[1]
    step = max(1, COLUMN_VALUES // features)
    for start in range(0, features, step):
        columns = out[:, start : start + step]
        unit = out.new_zeros(features, columns.shape[1])
        unit[start : start + step].fill_diagonal_(1.0)
        with float32_products(out, "ieee"):
            product = chain_product(unit, values, batch_last=True)
        yield columns, product
