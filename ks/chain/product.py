"""y = x Wᵀ for W = K_1 … K_L in plain operations of torch, so that compilers and transforms see through a chain.

A factor of the pattern (a, b, c, d) multiplies as a·d matrices of shape c × b, inputs first, with the batch in front:
torch.bmm is 2 to 10 times slower on a few samples in the other orders. Between two products lies one permutation.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch

from ks.chain.merge import MERGE_BATCH, merge_factors, merge_runs, merged_pattern
from ks.chain.patterns import Pattern
from ks.errors import UsageError


def empty_blocks(pattern: Pattern, device=None, dtype=None) -> torch.Tensor:
    """Return uninitialised values of a factor as they multiply, shape (a·d, c, b)."""
    a, b, c, d = pattern
    return torch.empty(a * d, c, b, device=device, dtype=dtype)


def values_of(blocks: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Return blocks (a·d, c, b) as a view of shape (a, b, c, d)."""
    return blocks.view(pattern.a, pattern.d, pattern.c, pattern.b).permute(0, 3, 2, 1)


def blocks_of(values: torch.Tensor) -> torch.Tensor:
    """Return values (a, b, c, d) as blocks of shape (a·d, c, b): a view if they lie in memory like that."""
    a, b, c, d = values.shape
    return values.permute(0, 3, 2, 1).reshape(a * d, c, b)


class Move(NamedTuple):
    """View, permutation and copy by which features enter the next product; None where nothing is to be done.

    A view is a pair of sizes, those before and those behind the batch.
    """

    view: tuple[tuple[int, ...], tuple[int, ...]] | None
    order: tuple[int, ...] | None
    copy: tuple[tuple[int, ...], tuple[int, ...]] | None


class ChainLayout(NamedTuple):
    """Everything about the product of a chain with a batch that follows from its patterns.

    Args:
        patterns: of the factors, output side first.
        batch_last: whether features come first.
        blocks_in: whether x has the shape (..., a, c), its features as the right-most factor takes them.
        blocks_out: whether y has the shape (..., d, b), its features as the left-most factor makes them.
        inputs: the sizes of the features of x, (a·c·d,) or with blocks_in (a, c).
        moves: before every product, from right to left, and behind the last one.
        bias_shape: of the bias beside the permuted outputs.
        outputs: the view of the permuted outputs as y; None if they are y.
        interleaves: whether the last permutation leaves no row of a product contiguous.
        grid: (p, r, q) of two factors that meet in a q × p grid of blocks of rank r, for `_grid_product`; or None.
        runs: ranges of neighbouring small factors that are multiplied with each other before they meet a large batch.
        merged: the layout of the chain that they become; None if there are none.
    """

    patterns: tuple[Pattern, ...]
    batch_last: bool
    blocks_in: bool
    blocks_out: bool
    inputs: tuple[int, ...]
    moves: tuple[tuple[Move, ...], ...]
    bias_shape: tuple[int, ...]
    outputs: tuple[tuple[int, ...], tuple[int, ...]] | None
    interleaves: bool
    grid: tuple[int, int, int] | None = None
    runs: tuple[tuple[int, int], ...] = ()
    merged: Optional["ChainLayout"] = None


@functools.lru_cache(maxsize=1024)
def chain_layout(
    patterns: tuple[Pattern, ...], batch_last: bool = False, blocks_in: bool = False, blocks_out: bool = False
) -> ChainLayout:
    """Return the layout of a chain; the arguments are its fields."""
    end = (1, patterns[-1].cols, 1)  # (a, b, d) of the features so far
    moves: list[tuple[Move, ...]] = []
    for a, b, c, d in reversed(patterns):
        moves.append(_moves(end, (a, c, d), batch_last, x_is_plain=not moves))
        end = (a, b, d)
    a, b, d = end
    moves.append(_moves(end, (1, a * b * d, 1), batch_last, y_is_plain=True))
    if blocks_in:
        moves[0] = (Move(None, None if batch_last else (1, 0, 2), None),)
    if blocks_out:
        moves[-1] = (Move(None, None if batch_last else (1, 0, 2), None),)
    last = moves[-1][-1]
    sizes = [size for size in end if size > 1] if last.order else [a * b * d]
    bias_shape = (*sizes, *([1] * batch_last))
    moves[-1] = (*moves[-1][:-1], last._replace(copy=None))
    interleaves = last.copy is not None and not batch_last
    first = patterns[-1]
    inputs = (first.a, first.c) if blocks_in else (first.cols,)
    layout = ChainLayout(
        patterns, batch_last, blocks_in, blocks_out, inputs, tuple(moves), bias_shape, last.copy, interleaves
    )
    runs = tuple(merge_runs(patterns))
    if blocks_in or blocks_out:
        return layout
    if len(runs) == len(patterns):
        return layout._replace(grid=_grid_of(patterns) if interleaves else None)
    merged = tuple(functools.reduce(merged_pattern, patterns[start:stop]) for start, stop in runs)
    return layout._replace(runs=runs, merged=chain_layout(merged, batch_last))


def _moves(source, target, batch_last: bool, *, x_is_plain=False, y_is_plain=False) -> tuple[Move, ...]:
    """Return how features ordered by `source` = (a, b, d) come into the order of `target` = (a, c, d).

    Products make and take them as (a·d, batch, b), or (a·d, b, batch) if batch_last; plain features are (batch, b).
    """
    (a, b, d), (a2, c, d2) = source, target
    cuts = sorted({1, d, b * d, d2, c * d2, a * b * d})
    if any(high % low for low, high in itertools.pairwise(cuts)):  # no axes that both orders share
        plain = (1, a * b * d, 1)
        return (
            *_moves(source, plain, batch_last, x_is_plain=x_is_plain, y_is_plain=True),
            *_moves(plain, target, batch_last, x_is_plain=True, y_is_plain=y_is_plain),
        )
    axes = list(itertools.pairwise(cuts))[::-1]  # (stride, stride of the next), from the slowest to the fastest
    before, after = _arranged(axes, b, d, batch_last), _arranged(axes, c, d2, batch_last)
    order = tuple(before.index(axis) for axis in after)
    held = _sizes([] if x_is_plain else [a * d], b, batch_last)
    wanted = _sizes([] if y_is_plain else [a2 * d2], c, batch_last)
    if order == tuple(range(len(order))):
        return (Move(None if held == wanted else wanted, None, None),)
    view, permuted = _around_batch(before), _around_batch(after)
    # An exchange of dimensions that keeps rows contiguous stays a view; torch.bmm reads it in place.
    stays = permuted == wanted and before[-1] == after[-1] and not y_is_plain
    return (Move(None if view == held else view, order, None if stays else wanted),)


def _arranged(axes, width: int, inner: int, batch_last: bool) -> list:
    """Return axes in the order (a, d, batch, b), or (a, d, b, batch); the batch is None."""
    groups = [axis for axis in axes if not inner <= axis[0] < width * inner]
    within = [axis for axis in axes if inner <= axis[0] < width * inner]
    return [*groups, *within, None] if batch_last else [*groups, None, *within]


def _around_batch(axes: list) -> tuple[tuple[int, ...], tuple[int, ...]]:
    place = axes.index(None)
    sizes = [high // low for low, high in axes[:place]], [high // low for low, high in axes[place + 1 :]]
    return tuple(sizes[0]), tuple(sizes[1])


def _sizes(groups: list[int], width: int, batch_last: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ((*groups, width), ()) if batch_last else (tuple(groups), (width,))


def multiply(
    x: torch.Tensor, blocks: Sequence[torch.Tensor], layout: ChainLayout, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return y = x Wᵀ + bias, as `ks.chain.operator.chain_product` does.

    Args:
        x: as there; with blocks_in of shape (..., a, c), or (a, c, ...).
        blocks: of the factors, shapes (a_l·d_l, c_l, b_l), output side first.
        layout: of the chain.
        bias: shape (m,).
    Returns:
        tensor of shape (..., m) or (m, ...), contiguous; with blocks_out of shape (..., d, m/d) or (d, m/d, ...).
    """
    check_input(x, blocks, layout)
    if layout.grid is not None and x.dim() == 2:
        return _grid_product(x, blocks, layout.grid, bias)
    batch_last, split = layout.batch_last, 1 + layout.blocks_in
    flat = x.dim() == 1 + split
    if flat:
        batch = x.shape[-1 if batch_last else 0]
    else:
        batch_shape = x.shape[split:] if batch_last else x.shape[:-split]
        batch = math.prod(batch_shape)
        x = x.reshape(*x.shape[:split], batch) if batch_last else x.reshape(batch, *x.shape[-split:])
    if layout.merged is not None and (not _is_eager() or batch >= MERGE_BATCH):
        blocks, layout = _merged(blocks, layout), layout.merged
    for moves, block in zip(layout.moves, reversed(blocks)):
        x = _moved(x, moves, batch)
        x = torch.bmm(block.mT, x) if batch_last else torch.bmm(x, block)
    y = _moved(_copied_backward(x) if layout.interleaves else x, layout.moves[-1], batch)
    if bias is not None:
        y = _plus_bias(y, _beside_outputs(bias.to(x.dtype), layout))
    if layout.outputs is not None:
        y = y.reshape(*layout.outputs[0], batch, *layout.outputs[1])
        y = y.contiguous()  # a reshape is a view if b = 1
    if not flat:
        size = 1 + layout.blocks_out
        y = y.reshape(*y.shape[:size], *batch_shape) if batch_last else y.reshape(*batch_shape, *y.shape[-size:])
    return y


def _moved(x: torch.Tensor, moves: tuple[Move, ...], batch: int) -> torch.Tensor:
    for view, order, copy in moves:
        if view is not None:
            x = x.reshape(*view[0], batch, *view[1])
        if order is not None:
            x = x.permute(*order)
        if copy is not None:
            # Not reshape: at batch 1 it would find a view whose rows have gaps, on which torch.bmm is slow.
            x = x.contiguous().view(*copy[0], batch, *copy[1])
    return x


def _grid_of(patterns: tuple[Pattern, ...]) -> tuple[int, int, int] | None:
    if len(patterns) != 2:
        return None
    left, right = patterns
    fits = left.a == right.d == 1 and left.c % right.a == 0 and right.b % left.d == 0
    return (right.a, left.c // right.a, left.d) if fits and min(left.b, left.d, right.a) > 1 else None


def _grid_product(
    x: torch.Tensor, blocks: Sequence[torch.Tensor], grid: tuple[int, int, int], bias: torch.Tensor | None
) -> torch.Tensor:
    """Return what `multiply` does of rows of x by two factors in a grid.

    On a few samples, Python and views cost more than the products; these lines take 0.8 of the time of the general
    ones.
    """
    (p, rank, q), (left, right), batch = grid, blocks, x.shape[0]
    width, inner = right.shape[1], p * rank
    if _is_eager() and batch == 1:
        z = torch.bmm(x.reshape(p, 1, width), right).view(1, inner, q).permute(2, 0, 1).contiguous()
    else:
        z = torch.bmm(x.reshape(batch, p, width).transpose(0, 1), right)
        z = z.view(p, batch, rank, q).permute(3, 1, 0, 2).contiguous()  # p batch (r q) -> q batch (p r)
        z = z.view(q, batch, inner)
    y = _copied_backward(torch.bmm(z, left)).permute(1, 2, 0)
    if bias is not None:
        y = _plus_bias(y, bias.to(y.dtype).view(-1, q))
    return y.reshape(batch, left.shape[2] * q)


def _copied_backward(y: torch.Tensor) -> torch.Tensor:
    """Return y; its gradient, which is interleaved, will be copied once and not by each of the two products behind.

    The backward pass of a split puts the gradients of its parts into one contiguous tensor.
    """
    return y.split(y.shape[0])[0] if y.requires_grad and _is_eager() else y


def _plus_bias(y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return permuted outputs plus the bias, contiguous, in one pass: the first operand decides the memory order.

    On a CPU, sums of halves that are not contiguous are 5 times slower than a copy.
    """
    return y.contiguous() + bias if y.dtype.itemsize == 2 and y.device.type == "cpu" else bias + y


def _is_eager() -> bool:
    """Return whether a decision by the size of the batch holds for this call alone, not for a recorded program."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _beside_outputs(bias: torch.Tensor, layout: ChainLayout) -> torch.Tensor:
    """Return the bias in the shape that broadcasts over the permuted outputs of the left-most factor."""
    if not layout.blocks_out:
        return bias if len(layout.bias_shape) == 1 else bias.view(layout.bias_shape)
    d = layout.patterns[0].d
    bias = bias.view(-1, d).mT
    return bias.unsqueeze(-1) if layout.batch_last else bias


def _merged(blocks: Sequence[torch.Tensor], layout: ChainLayout) -> list[torch.Tensor]:
    """Return the blocks of the runs of a chain, each multiplied out to one factor."""
    values = [values_of(block, pattern) for block, pattern in zip(blocks, layout.patterns)]
    runs = (values[start:stop] for start, stop in layout.runs)
    return [blocks_of(functools.reduce(merge_factors, run)) for run in runs]


def check_input(x: torch.Tensor, blocks: Sequence[torch.Tensor], layout: ChainLayout) -> None:
    """Raise UsageError for an x of other features or another dtype than a chain."""
    if torch.jit.is_tracing():  # sizes are tensors there
        return
    inputs = layout.inputs
    if (x.shape[: len(inputs)] if layout.batch_last else x.shape[-len(inputs) :]) != inputs:
        size = len(inputs)
        where = f"{'first' if layout.batch_last else 'last'} {f'{size} dimensions' if size > 1 else 'dimension'}"
        raise UsageError(f"input of shape {tuple(x.shape)}: the {where} must be {', '.join(map(str, inputs))}")
    if x.dtype != blocks[0].dtype and not torch.is_autocast_enabled(x.device.type):
        raise UsageError(f"input is {x.dtype}, the chain {blocks[0].dtype}: convert one of them")
