"""The chain product as a function of x and the values of the factors, on either backend."""

import functools
from collections.abc import Callable, Sequence

import torch

from ks.chain.backend import check_impl
from ks.chain.passes import ChainPasses
from ks.chain.patterns import Pattern
from ks.chain.product import ChainLayout, blocks_of, chain_layout, check_input, multiply, values_of
from ks.errors import UsageError


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
        impl: 'auto' and 'bmm' for plain operations of torch, 'triton' for the kernels, with first derivatives alone.
    Returns:
        contiguous tensor of shape (..., m), or (m, ...) if batch_last.
    Raises:
        UsageError: the features of x do not match the right-most factor, dtypes differ, or an impl that cannot run.
    """
    check_impl(impl, x.device)
    layout = chain_layout(tuple(Pattern(*factor.shape) for factor in values), batch_last)
    return product_function(impl)(x, [blocks_of(factor) for factor in values], layout, bias)


def product_function(impl: str) -> Callable:
    """Return the function of (x, blocks, layout, bias) that multiplies on a backend."""
    return triton_product if impl == "triton" else multiply


def triton_product(
    x: torch.Tensor, blocks: Sequence[torch.Tensor], layout: ChainLayout, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return y = x Wᵀ + bias by the Triton kernels, as `ks.chain.product.multiply` does by torch.bmm.

    Raises:
        UsageError: features in blocks; or within torch.compile, torch.export or torch.jit.trace, which cannot see
            through the kernels.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise UsageError("impl 'triton' cannot be compiled, exported or traced; set layer.impl = 'auto' for that")
    if layout.blocks_in or layout.blocks_out:
        raise UsageError("impl 'triton' takes no features in blocks; use 'auto'")
    check_input(x, blocks, layout)
    batch_last, device_type = layout.batch_last, x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, blocks = x.to(dtype), [block.to(dtype) for block in blocks]
    batch_shape = x.shape[1:] if batch_last else x.shape[:-1]
    batch = batch_shape.numel()
    x = x.reshape(x.shape[0], batch).contiguous() if batch_last else x.reshape(batch, x.shape[-1])
    values = [values_of(block, pattern) for block, pattern in zip(blocks, layout.patterns)]
    y = _TritonChain.apply(x, layout, *values)
    y = y.view(y.shape[0], *batch_shape) if batch_last else y.view(*batch_shape, y.shape[-1])
    if bias is None:
        return y
    bias = bias.to(y.dtype)
    return y + (bias.view(-1, *[1] * len(batch_shape)) if batch_last else bias)


class _TritonChain(torch.autograd.Function):
    """(batch, n) → (batch, m), or (n, batch) → (m, batch) if batch_last."""

    @staticmethod
    def forward(ctx, x, layout, *values):
        batch = x.shape[layout.batch_last]
        ctx.passes = _passes(layout.patterns, batch, x.device, x.dtype, layout.batch_last)
        y, *inner = ctx.passes.forward(x, values)
        ctx.save_for_backward(x, *values, *inner)
        return y

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise UsageError("impl 'triton' has no second derivatives; set layer.impl = 'auto' for them")
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        x, *saved = ctx.saved_tensors
        values, inner = saved[: len(needed) - 1], saved[len(needed) - 1 :]
        found = iter(ctx.passes.backward(gradient, x, values, inner, needed=needed))
        for_x, *for_values = (next(found) if wanted else None for wanted in needed)
        return for_x, None, *for_values


@functools.lru_cache(maxsize=256)
def _passes(patterns, batch: int, device: torch.device, dtype: torch.dtype, batch_last: bool) -> ChainPasses:
    return ChainPasses(patterns, batch, device, dtype, batch_last=batch_last, impl="triton")
