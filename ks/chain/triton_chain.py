"""The chain product on the Triton kernels, for `impl="triton"`: one autograd function, first derivatives alone."""

import functools
from collections.abc import Sequence

import torch

from ks.chain.passes import ChainPasses
from ks.chain.product import ChainLayout, check_input, values_of
from ks.errors import UsageError


def triton_product(
    x: torch.Tensor, blocks: Sequence[torch.Tensor], layout: ChainLayout, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return y = x Wᵀ + bias, as `ks.chain.product.multiply` does.

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
    x = x.reshape(x.shape[0], -1).contiguous() if batch_last else x.reshape(batch_shape.numel(), x.shape[-1])
    values = [values_of(block, pattern) for block, pattern in zip(blocks, layout.patterns)]
    y = _TritonChain.apply(x, layout, *values)
    y = y.view(-1, *batch_shape) if batch_last else y.view(*batch_shape, -1)
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
