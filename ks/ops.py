"""The differentiable chain product: one autograd function for the whole chain, and the choice of its backend.

Inside, every activation is a logical (features, batch) matrix, whatever its strides. A factor then is a batch of a·d
small matrix products on views: only a factor with a > 1 and d > 1 (inside a deep butterfly) has to copy, and a
batch-first output costs one copy at the very end when d > 1. Values have shape (a, b, c, d) at the API; stored in
memory as (a, d, b, c), as `empty_values` does, they are read and updated in place.
"""

import torch
from torch.autograd.function import once_differentiable

from ks.patterns import Pattern

IMPLS = ("auto", "triton", "bmm")


def choose_impl(impl: str, device: torch.device) -> tuple[str, str]:
    """Resolve `--impl` to a backend that runs here.

    Args:
        impl: 'auto', 'triton' or 'bmm'.
        device: where the chain will run.
    Returns:
        (backend, reason).
    Raises:
        ValueError: unknown name, or a backend that cannot run here.
    """
    if impl == "auto":
        return "bmm", f"batched matrix products, the one backend of this version for {device.type}"
    if impl == "bmm":
        return "bmm", "as asked"
    if impl == "triton":
        raise ValueError("impl 'triton': this version has no Triton kernels; use 'auto' or 'bmm'")
    raise ValueError(f"impl {impl!r}: choose one of {', '.join(IMPLS)}")


def empty_values(pattern: Pattern, device=None, dtype=None) -> torch.Tensor:
    """Uninitialised values of shape (a, b, c, d) in the memory order (a, d, b, c) that the product reads in place."""
    a, b, c, d = pattern
    return torch.empty(a, d, b, c, device=device, dtype=dtype).permute(0, 2, 3, 1)


def chain_product(x: torch.Tensor, values: list[torch.Tensor], batch_last: bool = False) -> torch.Tensor:
    """Return y = x Wᵀ for W = K_1 … K_L, factor by factor from the right.

    Per factor: y[n, i, j, t] = Σ_k v[i, j, k, t] · x[n, i, k, t], flattened to a·b·d features.
    Under autocast the product runs in the autocast dtype. Accumulation is in float32 or wider.

    Args:
        x: shape (..., n), or (n, ...) if batch_last; any leading (trailing) batch shape, the empty one included.
        values: shapes (a_l, b_l, c_l, d_l), output side first; floating, the dtype and device of x.
        batch_last: whether features come first and the batch last.
    Returns:
        contiguous tensor of shape (..., m), or (m, ...) if batch_last.
    Raises:
        ValueError: the features of x do not match the right-most factor, or dtypes differ.
    """
    first, last = values[0].shape, values[-1].shape
    out_features, in_features = first[0] * first[1] * first[3], last[0] * last[2] * last[3]
    given = x.shape[0 if batch_last else -1] if x.ndim else None
    if given != in_features:
        place = "first" if batch_last else "last"
        raise ValueError(f"input of shape {tuple(x.shape)}: the {place} dimension must be {in_features}")
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, values = x.to(dtype), [factor.to(dtype) for factor in values]
    if any(factor.dtype != x.dtype for factor in values):
        raise ValueError(f"input is {x.dtype}, the chain {values[0].dtype}: convert one of them")
    if batch_last:
        y = _ChainProduct.apply(x.reshape(in_features, x.shape[1:].numel()), True, *values)
        return y.view(out_features, *x.shape[1:])
    y = _ChainProduct.apply(x.reshape(x.shape[:-1].numel(), in_features).t(), False, *values)
    return y.t().view(*x.shape[:-1], out_features)


class _ChainProduct(torch.autograd.Function):
    """(n, batch) → (m, batch), logically; `batch_last` only says how the result lies in memory."""

    @staticmethod
    def forward(ctx, x, batch_last, *values):
        inputs = [x]  # inputs[l] enters the l-th factor from the right; shape: (features, batch)
        for factor in reversed(values[1:]):
            inputs.append(_apply_factor(factor, inputs[-1]))
        ctx.save_for_backward(*values, *inputs)
        return _apply_factor(values[0], inputs[-1], batch_last)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        length = len(ctx.saved_tensors) // 2
        values, inputs = ctx.saved_tensors[:length], ctx.saved_tensors[: length - 1 : -1]
        value_gradients = []
        for index, (factor, entered) in enumerate(zip(values, inputs)):
            gradient_blocks = _blocks(gradient, factor.shape[0], factor.shape[3])
            value_gradients.append(
                _values_gradient(factor, gradient_blocks, entered) if ctx.needs_input_grad[2 + index] else None
            )
            if index < length - 1 or ctx.needs_input_grad[0]:
                gradient = _apply_factor(factor.transpose(1, 2), gradient)
            else:
                gradient = None
        return gradient, None, *value_gradients


def _blocks(features: torch.Tensor, a: int, d: int) -> torch.Tensor:
    """(a·f·d, batch) → (a·d, f, batch), a view that matrix products read in place wherever the strides allow."""
    blocks = features.unflatten(0, (a, -1, d)).transpose(1, 2).flatten(0, 1)
    return blocks if 1 in blocks.stride()[1:] else blocks.contiguous()


def _apply_factor(factor: torch.Tensor, x: torch.Tensor, batch_last: bool = True) -> torch.Tensor:
    """Multiply (a·c·d, batch) by one factor of shape (a, b, c, d); the (a·b·d, batch) result is laid out as asked."""
    a, b, _, d = factor.shape
    batch = x.shape[1]
    matrices = factor.permute(0, 3, 1, 2).flatten(0, 1)  # shape: (a·d, b, c)
    out = x.new_empty(a * b * d, batch) if batch_last else x.new_empty(batch, a * b * d).t()
    out_blocks = out.unflatten(0, (a, b, d)).transpose(1, 2)  # shape: (a, d, b, batch)
    if 1 in (a, d) and 1 in out_blocks.stride()[2:]:
        torch.bmm(matrices, _blocks(x, a, d), out=out_blocks.squeeze(0 if a == 1 else 1))
    else:
        out_blocks.copy_(torch.bmm(matrices, _blocks(x, a, d)).unflatten(0, (a, d)))
    return out


def _values_gradient(factor: torch.Tensor, gradient_blocks: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Σ over the batch of gradient ⊗ x, blockwise; shape (a, b, c, d), memory order (a, d, b, c)."""
    a, _, _, d = factor.shape
    product = torch.bmm(gradient_blocks, _blocks(x, a, d).transpose(1, 2))
    return product.unflatten(0, (a, d)).permute(0, 2, 3, 1)
