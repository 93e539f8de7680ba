"""The differentiable chain product: one autograd function, and two registered operators for torch.compile.

`ks::chain` and `ks::chain_backward` are opaque to a compiler, which knows only the shapes and strides of their results.
Eager code calls their implementation directly, which saves two trips through the dispatcher.
"""

import functools

import torch
from torch.autograd.function import once_differentiable

from ks.errors import UsageError
from ks.patterns import Pattern
from ks.product.bmm import empty_values
from ks.product.merge import merge_runs
from ks.product.passes import ChainPasses


def chain_product(
    x: torch.Tensor,
    values: list[torch.Tensor],
    batch_last: bool = False,
    *,
    impl: str = "auto",
    precision: str = "ieee",
) -> torch.Tensor:
    """Return y = x Wᵀ for W = K_1 … K_L, factor by factor from the right.

    Per factor: y[n, i, j, t] = Σ_k v[i, j, k, t] · x[n, i, k, t], flattened to a·b·d features.
    Under autocast the product runs in the autocast dtype. Accumulation is in float32 or wider. Where the batch is
    large, runs of small factors are multiplied with each other first (`ks.product.merge`).

    Args:
        x: shape (..., n), or (n, ...) if batch_last; any leading (trailing) batch shape, the empty one included.
        values: shapes (a_l, b_l, c_l, d_l), output side first; floating, the dtype and device of x.
        batch_last: whether features come first and the batch last.
        impl: backend; 'auto', 'triton' or 'bmm'.
        precision: of float32 products on a CUDA device; 'ieee', 'tf32x3' (Triton alone) or 'tf32'.
    Returns:
        contiguous tensor of shape (..., m), or (m, ...) if batch_last.
    Raises:
        UsageError: the features of x do not match the right-most factor, dtypes differ, or a backend that cannot run.
    """
    last = values[-1].shape
    in_features = last[0] * last[2] * last[3]
    given = x.shape[0 if batch_last else -1] if x.ndim else None
    if given != in_features:
        place = "first" if batch_last else "last"
        raise UsageError(f"input of shape {tuple(x.shape)}: the {place} dimension must be {in_features}")
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, values = x.to(dtype), [factor.to(dtype) for factor in values]
    if any(factor.dtype != x.dtype for factor in values):
        raise UsageError(f"input is {x.dtype}, the chain {values[0].dtype}: convert one of them")
    batch_shape = x.shape[1:] if batch_last else x.shape[:-1]
    if len(batch_shape) != 1:
        batch = batch_shape.numel()
        x = x.reshape((in_features, batch) if batch_last else (batch, in_features))
    keep = torch.is_grad_enabled() and any(factor.requires_grad for factor in values)
    if keep or (torch.is_grad_enabled() and x.requires_grad):
        y = _ChainProduct.apply(x, batch_last, impl, precision, keep, *values)
    else:
        y = _operator("chain")(x, values, batch_last, impl, precision, False)[0]
    if len(batch_shape) != 1:
        y = y.view((y.shape[0], *batch_shape) if batch_last else (*batch_shape, y.shape[1]))
    return y


def _operator(name: str):
    if torch.compiler.is_compiling():
        return getattr(torch.ops.ks, name)
    return {"chain": _chain, "chain_backward": _chain_backward}[name]


class _ChainProduct(torch.autograd.Function):
    """(batch, n) → (batch, m), or (n, batch) → (m, batch) if batch_last."""

    @staticmethod
    def forward(ctx, x, batch_last, impl, precision, keep, *values):
        y, *inner = _operator("chain")(x, values, batch_last, impl, precision, keep)
        ctx.settings = batch_last, impl, precision
        ctx.save_for_backward(x, *values, *inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        x, *saved = ctx.saved_tensors
        values, inner = saved[: len(needed) - 1], saved[len(needed) - 1 :]
        backward = _operator("chain_backward")
        found = iter(backward(gradient, x, values, inner, *ctx.settings, needed))
        for_x, *for_values = (next(found) if wanted else None for wanted in needed)
        return for_x, None, None, None, None, *for_values


@functools.lru_cache(maxsize=256)
def _passes(shapes, batch, device, dtype, batch_last, impl, precision) -> ChainPasses:
    patterns = tuple(Pattern(*shape) for shape in shapes)
    return ChainPasses(patterns, batch, device, dtype, batch_last=batch_last, impl=impl, precision=precision)


def _passes_for(x, values, batch_last, *settings) -> ChainPasses:
    shapes = tuple(factor.shape for factor in values)
    return _passes(shapes, x.shape[batch_last], x.device, x.dtype, batch_last, *settings)


def _chain(x, values, batch_last, impl, precision, keep):
    return _passes_for(x, values, batch_last, impl, precision).forward(x, values, keep)


def _chain_backward(gradient, x, values, inner, batch_last, impl, precision, needed):
    passes = _passes_for(x, values, batch_last, impl, precision)
    return passes.backward(gradient, x, values, inner, needed=needed)


def _chain_meta(x, values, batch_last, impl, precision, keep):
    batch, patterns = x.shape[batch_last], tuple(Pattern(*factor.shape) for factor in values)
    y = x.new_empty((patterns[0].rows, batch) if batch_last else (batch, patterns[0].rows))
    firsts = [start for start, _ in merge_runs(patterns, batch)]
    return [y, *(x.new_empty(patterns[start].rows, batch) for start in firsts[1:] if keep)]


def _chain_backward_meta(gradient, x, values, inner, batch_last, impl, precision, needed):
    for_x = [torch.empty_like(x, memory_format=torch.contiguous_format)] if needed[0] else []
    wanted = (factor for factor, want in zip(values, needed[1:]) if want)
    return for_x + [empty_values(factor.shape, x.device, x.dtype) for factor in wanted]


_LIBRARY = torch.library.Library("ks", "DEF")  # the registrations live as long as this object
_LIBRARY.define("chain(Tensor x, Tensor[] values, bool batch_last, str impl, str precision, bool keep) -> Tensor[]")
_LIBRARY.define(
    "chain_backward(Tensor gradient, Tensor x, Tensor[] values, Tensor[] inner, bool batch_last, str impl, "
    "str precision, bool[] needed) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("chain", _chain, _key)
    _LIBRARY.impl("chain_backward", _chain_backward, _key)
_LIBRARY.impl("chain", _chain_meta, "Meta")
_LIBRARY.impl("chain_backward", _chain_backward_meta, "Meta")
