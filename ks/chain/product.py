"""y = x Wᵀ for W = K_1 … K_L in plain operations of torch, so that compilers and transforms see through a chain.

A factor of the pattern (a, b, c, d) multiplies as a·d matrices of shape c × b, inputs first, with the batch in front:
torch.bmm is 2 to 10 times slower on a few samples in the other orders. Between two products lies one permutation.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ks.chain.backend import choose_impl
from ks.chain.merge import MERGE_BATCH, merge_factors, merge_runs, merged_pattern
from ks.chain.passes import ChainPasses
from ks.chain.patterns import Pattern, chainability
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


class ChainLayout(NamedTuple):
    """How features enter and leave a chain, and which of its factors merge.

    Args:
        patterns: of the factors, output side first.
        runs: ranges of neighbouring small factors that are multiplied with each other before they meet a large batch
            (`ks.chain.merge.merge_runs`); none with features in blocks.
        batch_last: whether features come first.
        blocks_in: whether x has the shape (..., a, c), its features as the right-most factor takes them.
        blocks_out: whether y has the shape (..., d, b), its features as the left-most factor makes them.
        grid: (p, r, q) of two factors that meet in a q × p grid of blocks of rank r (p = q = 1 for low-rank), which
            `_grid_product` multiplies; None for every other chain or order of features.
    """

    patterns: tuple[Pattern, ...]
    runs: Sequence[tuple[int, int]]
    batch_last: bool = False
    blocks_in: bool = False
    blocks_out: bool = False
    grid: tuple[int, int, int] | None = None


def chain_layout(patterns: tuple[Pattern, ...], batch_last: bool = False) -> ChainLayout:
    """Return the layout of a chain of plain features."""
    left, right, runs = patterns[0], patterns[-1], merge_runs(patterns)
    rank = left.c // right.a
    is_grid = len(patterns) == len(runs) == 2 and left.a == right.d == 1 < left.b and right.b == rank * left.d
    grid = (right.a, rank, left.d) if is_grid and left.c == right.a * rank and not batch_last else None
    return ChainLayout(patterns, runs, batch_last, grid=grid)


def chain_product(
    x: torch.Tensor,
    values: Sequence[torch.Tensor],
    batch_last: bool = False,
    *,
    bias: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return y = x Wᵀ + bias for W = K_1 … K_L, factor by factor from the right.

    Per factor: y[n, i, j, t] = Σ_k v[i, j, k, t] · x[n, i, k, t], flattened to a·b·d features. Runs of small factors
    are multiplied with each other before they meet a large batch, and always in compiled, exported or traced programs
    (`ks.chain.merge`). Precision and autocast are those of torch.bmm.

    Args:
        x: shape (..., n), or (n, ...) if batch_last; any leading (trailing) batch shape, the empty one included.
        values: shapes (a_l, b_l, c_l, d_l), output side first; floating, the dtype and device of x.
        batch_last: whether features come first and the batch last.
        bias: shape (m,).
        impl: 'auto' and 'bmm' for plain operations of torch, 'triton' for the kernel, with first derivatives alone.
    Returns:
        contiguous tensor of shape (..., m), or (m, ...) if batch_last.
    Raises:
        UsageError: the features of x do not match the right-most factor, dtypes differ, or an impl that cannot run.
    """
    choose_impl(impl, x.device)
    patterns = tuple(Pattern(*factor.shape) for factor in values)
    layout = chain_layout(patterns, batch_last)
    return multiply(x, [blocks_of(factor) for factor in values], layout, bias, impl)


def multiply(
    x: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    layout: ChainLayout,
    bias: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return y = x Wᵀ + bias, as `chain_product` does, for factors as blocks of shapes (a_l·d_l, c_l, b_l).

    Args:
        x: as there; with blocks_in of shape (..., a, c), or (a, c, ...).
        bias, impl: as there.
    Returns:
        tensor of shape (..., m) or (m, ...), contiguous; with blocks_out of shape (..., d, m/d) or (d, m/d, ...).
    """
    patterns, _, batch_last, blocks_in, blocks_out, grid = layout
    first, last = patterns[0], patterns[-1]
    inputs = (last.a, last.c) if blocks_in else (last.cols,)
    _check_input(x, blocks[0].dtype, inputs, batch_last)
    if grid is not None and x.dim() == 2 and impl != "triton":
        return _grid_product(x, blocks, grid, bias)
    size = len(inputs)
    batch_shape = x.shape[size:] if batch_last else x.shape[: x.dim() - size]
    x = x.reshape(*inputs, -1).movedim(-1, 0) if batch_last else x.reshape(-1, *inputs)
    y = (_triton_product if impl == "triton" else _plain_product)(x, blocks, layout)
    outputs = (first.d, first.b) if blocks_out else (first.rows,)
    if bias is not None:
        bias = bias.to(y.dtype)
        y = _plus_bias(y, bias.view(first.b, first.d).mT if blocks_out else bias.view(y.shape[1:]))
    y = y.movedim(0, -1) if batch_last else y
    shape = (*outputs, *batch_shape) if batch_last else (*batch_shape, *outputs)
    return y.reshape(shape) if blocks_out else y.reshape(shape).contiguous()  # a reshape is a view if b = 1


def _plain_product(x: torch.Tensor, blocks: Sequence[torch.Tensor], layout: ChainLayout) -> torch.Tensor:
    """Return y as a view of shape (batch, a, b, d), or (batch, d, b) with blocks_out, for x of shape (batch, ...)."""
    patterns, batch = layout.patterns, x.shape[0]
    if 0 < len(layout.runs) < len(patterns) and (not _is_eager() or batch >= MERGE_BATCH):
        values = [values_of(block, pattern) for block, pattern in zip(blocks, patterns)]
        blocks = [blocks_of(functools.reduce(merge_factors, values[start:stop])) for start, stop in layout.runs]
        patterns = tuple(functools.reduce(merged_pattern, patterns[start:stop]) for start, stop in layout.runs)
    a, _, c, d = patterns[-1]
    x = x.reshape(batch, a, c, d).permute(1, 3, 0, 2).reshape(a * d, batch, c)  # batch (a c d) -> (a d) batch c
    x = torch.bmm(x, blocks[-1])
    for index in range(len(patterns) - 2, -1, -1):
        x = torch.bmm(_rearranged(x, patterns[index], patterns[index + 1], batch), blocks[index])
    a, b, _, d = patterns[0]
    x = (_copied_backward(x) if d > 1 else x).view(a, d, batch, b)
    return x[0].permute(1, 0, 2) if layout.blocks_out else x.permute(2, 0, 3, 1)


def _grid_product(
    x: torch.Tensor, blocks: Sequence[torch.Tensor], grid: tuple[int, int, int], bias: torch.Tensor | None
) -> torch.Tensor:
    """Return y of shape (batch, m) for x of shape (batch, n) and two factors in a grid.

    On a few samples, Python and views cost more than the products: these lines take 0.6 to 0.8 of the time of the
    general ones.
    """
    (p, rank, q), (left, right), batch = grid, blocks, x.shape[0]
    if p == q == 1:
        y = x.mm(right[0]).mm(left[0])
        return y if bias is None else y + bias.to(y.dtype)
    width, inner = right.shape[1], p * rank
    if _is_eager() and batch == 1:
        z = torch.bmm(x.reshape(p, 1, width), right).view(1, inner, q).permute(2, 0, 1).contiguous()
    else:
        z = torch.bmm(x.reshape(batch, p, width).transpose(0, 1), right)
        z = z.view(p, batch, rank, q).permute(3, 1, 0, 2).contiguous()  # p batch (r q) -> q batch (p r)
        z = z.view(q, batch, inner)
    y = torch.bmm(z, left)
    y = _copied_backward(y).permute(1, 2, 0)  # q batch m/q -> batch (m/q q)
    if bias is not None:
        y = _plus_bias(y, bias.to(y.dtype).view(-1, q))
    return y.reshape(batch, left.shape[2] * q)


def _copied_backward(y: torch.Tensor) -> torch.Tensor:
    """Return y; its gradient, which is interleaved, is copied once and not by each of the two products behind.

    The backward pass of a split puts the gradients of its parts into one contiguous tensor.
    """
    return y.split(y.shape[0])[0] if y.requires_grad and _is_eager() else y


def _rearranged(x: torch.Tensor, left: Pattern, right: Pattern, batch: int) -> torch.Tensor:
    """Bring what the factor `right` makes, (a_2·d_2, batch, b_2), into the order of `left`, (a_1·d_1, batch, c_1)."""
    if (left.a, left.d) == (right.a, right.d):
        return x
    rank = chainability(left, right)
    if rank is None:  # no axes that both orders share
        x = x.view(right.a, right.d, batch, right.b).permute(2, 0, 3, 1)  # a d batch b -> batch (a b d)
        x = x.reshape(batch, left.a, left.c, left.d).permute(1, 3, 0, 2)  # batch (a c d) -> a d batch c
    else:
        x = x.view(left.a, right.a // left.a, right.d, batch, rank, left.d // right.d)
        x = x.permute(0, 5, 2, 3, 1, 4)  # (a_1 u) d_2 batch (ρ w) -> (a_1 w d_2) batch (u ρ)
    # Not reshape: at batch 1 it would find a view whose rows have gaps, on which torch.bmm is slow.
    return x.contiguous().view(left.a * left.d, batch, left.c)


def _plus_bias(y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return permuted outputs plus the bias, contiguous, in one pass: the first operand decides the memory order.

    On a CPU, sums of halves that are not contiguous are 5 times slower than a copy.
    """
    return y.contiguous() + bias if y.dtype.itemsize == 2 and y.device.type == "cpu" else bias + y


def _is_eager() -> bool:
    """Return whether a decision by the size of the batch holds for this call alone, not for a recorded program."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _check_input(x: torch.Tensor, dtype: torch.dtype, inputs: tuple[int, ...], batch_last: bool) -> None:
    if torch.jit.is_tracing():  # sizes are tensors there
        return
    size = len(inputs)
    if (x.shape[:size] if batch_last else x.shape[-size:]) != inputs:
        where = f"{'first' if batch_last else 'last'} {f'{size} dimensions' if size > 1 else 'dimension'}"
        raise UsageError(f"input of shape {tuple(x.shape)}: the {where} must be {', '.join(map(str, inputs))}")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise UsageError(f"input is {x.dtype}, the chain {dtype}: convert one of them")


def _triton_product(x: torch.Tensor, blocks: Sequence[torch.Tensor], layout: ChainLayout) -> torch.Tensor:
    """Return what `_plain_product` does, of shape (batch, a, b, d), by the Triton kernel.

    Raises:
        UsageError: features in blocks; or within torch.compile, torch.export or torch.jit.trace, which cannot see
            through the kernel.
    """
    if not _is_eager():
        raise UsageError("impl 'triton' cannot be compiled, exported or traced; set layer.impl = 'auto' for that")
    if layout.blocks_in or layout.blocks_out:
        raise UsageError("impl 'triton' takes no features in blocks; use 'auto'")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, blocks = x.to(dtype), [block.to(dtype) for block in blocks]
    passes = ChainPasses(layout.patterns, impl="triton")
    y = _TritonChain.apply(x, passes, *map(values_of, blocks, layout.patterns))
    a, b, _, d = layout.patterns[0]
    return y.view(-1, a, b, d)


class _TritonChain(torch.autograd.Function):
    """(batch, n) → (batch, m)."""

    @staticmethod
    def forward(ctx, x, passes, *values):
        y, *inner = passes.forward(x, values)
        ctx.passes = passes
        ctx.save_for_backward(x, *values, *inner)
        return y

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise UsageError("impl 'triton' has no second derivatives; set layer.impl = 'auto' for them")
        (x, *saved), length = ctx.saved_tensors, len(ctx.passes.patterns)
        for_x, *for_values = ctx.passes.backward(gradient, x, saved[:length], saved[length:], for_x=True)
        return for_x, None, *for_values
