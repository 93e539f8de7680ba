"""One factor by batched matrix products, on any device: a·d products of b × c matrices, read in place by their strides.

Activations are logical (features, batch) matrices, whatever their strides. An activation is copied only for a factor
with a > 1 and d > 1 (inside a deep butterfly), and where its features are contiguous and d > 1.
"""

import contextlib
from collections.abc import Sequence

import torch


def empty_values(pattern: Sequence[int], device=None, dtype=None) -> torch.Tensor:
    """Return uninitialised values of shape (a, b, c, d), in the memory order (a, d, b, c).

    Products with the batch behind the features read and write this order best: a training step at rank 64 takes 0.8 of
    the time that it takes in the order of `ks.layer.KSLinear`, whose batch is in front.
    """
    a, b, c, d = pattern
    return torch.empty(a, d, b, c, device=device, dtype=dtype).permute(0, 2, 3, 1)


def apply_factor(
    factor: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    x_block_order: bool = False,
    out_block_order: bool = False,
    precision: str = "ieee",
) -> None:
    """Write out = K x for the factor K with the given values.

    Args:
        factor: shape (a, b, c, d), any strides.
        x: shape (a·c·d, batch), any strides, or its `readable_blocks`.
        out: shape (a·b·d, batch), any strides, overwritten.
        x_block_order, out_block_order: whether the features of x, or of `out`, are ordered (a, d, f) and not (a, f, d).
        precision: of float32 products; 'tf32' rounds operands to TF32 on a GPU, everything else is IEEE.
    """
    a, b, c, d = factor.shape
    matrices = factor.permute(0, 3, 1, 2).reshape(a * d, b, c)
    blocks = readable_blocks(x, a, d, x_block_order)
    out_blocks = _blocks(out, a, d, out_block_order)
    with float32_products(x, precision):
        if out_blocks is not None and out_blocks.stride(1) == 1:
            # Half precision on a CPU is 100 times slower into an out that is not contiguous inside.
            torch.bmm(blocks.transpose(1, 2), matrices.transpose(1, 2), out=out_blocks.transpose(1, 2))
        elif out_blocks is not None:
            torch.bmm(matrices, blocks, out=out_blocks)
        elif out.stride(0) == 1:
            product = torch.bmm(blocks.transpose(1, 2), matrices.transpose(1, 2))  # shape: (a·d, batch, b)
            out.t().view(-1, a, b, d).copy_(product.view(a, d, -1, b).permute(2, 0, 3, 1))
        else:
            product = torch.bmm(matrices, blocks)
            out.view(a, b, d, -1).copy_(product.view(a, d, b, -1).transpose(1, 2))


def values_gradient(
    gradient: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    block_order: bool = False,
    precision: str = "ieee",
) -> None:
    """Write out = Σ over the batch of gradient ⊗ x, on the support of a factor.

    Args:
        gradient: of K x, shape (a·b·d, batch), any strides, or its `readable_blocks`.
        x: shape (a·c·d, batch), any strides.
        out: shape (a, b, c, d), from `empty_values`, overwritten; of the dtype of x, or float32, into which the product
            is converted.
        block_order: whether the features of `gradient` are ordered (a, d, f).
        precision: as in `apply_factor`.
    """
    a, b, c, d = out.shape
    blocks = readable_blocks(gradient, a, d, block_order)
    operands = (blocks, readable_blocks(x, a, d).transpose(1, 2))
    place = out.permute(0, 3, 1, 2).view(a * d, b, c)
    with float32_products(x, precision):
        if out.dtype == x.dtype:
            torch.bmm(*operands, out=place)
        else:
            place.copy_(torch.bmm(*operands))


def _blocks(features: torch.Tensor, a: int, d: int, block_order: bool = False) -> torch.Tensor | None:
    """Return (a·f·d, batch) as a view (a·d, f, batch) with a unit stride inside, or None if no such view exists.

    Row i·f·d + k·d + t becomes [i·d + t, k]; in block order it is row (i·d + t)·f + k. One stride leads over all of
    i·d + t if a = 1, d = 1, or in block order.
    """
    rows, batch = features.shape
    f = rows // (a * d)
    stride, batch_stride = features.stride()
    if block_order or d == 1:
        block_stride = f * stride
    elif a == 1:
        block_stride, stride = stride, d * stride
    else:
        return None
    if 1 not in (stride, batch_stride):
        return None
    return features.as_strided((a * d, f, batch), (block_stride, stride, batch_stride))


def readable_blocks(features: torch.Tensor, a: int, d: int, block_order: bool = False) -> torch.Tensor:
    """Return (a·f·d, batch) as (a·d, f, batch) with a unit stride inside: a view if possible, else a copy.

    A tensor that has that shape already is returned unchanged.
    """
    if features.dim() == 3:
        return features
    if (block_order or d == 1) and 1 not in features.stride():
        features = features.contiguous()
    blocks = _blocks(features, a, d, block_order)
    if blocks is not None:
        return blocks
    rows, batch = features.shape
    f = rows // (a * d)
    if features.stride(0) == 1:
        by_sample = features.t().view(batch, a, f, d).permute(1, 3, 0, 2)  # batch (a f d) -> a d batch f
        return by_sample.contiguous().view(a * d, batch, f).transpose(1, 2)
    return features.reshape(a, f, d, batch).transpose(1, 2).contiguous().view(a * d, f, batch)


@contextlib.contextmanager
def _precision_set_to(settings, wanted: str):
    before = settings.fp32_precision
    settings.fp32_precision = wanted
    try:
        yield
    finally:
        settings.fp32_precision = before


def float32_products(x: torch.Tensor, precision: str):
    """Return a context in which float32 products on the device of x are IEEE, or TF32 if asked for on a GPU.

    A global setting (torch.backends, torch.set_float32_matmul_precision) is overruled in both directions.
    """
    if x.dtype != torch.float32:
        return _NOTHING
    on_gpu = x.is_cuda
    wanted = "tf32" if on_gpu and precision == "tf32" else "ieee"
    # Reading torch.backends takes 2 µs, and a training step does it five times.
    current = torch._C._get_fp32_precision_getter("cuda" if on_gpu else "mkldnn", "matmul")
    if current == wanted or (current, wanted) == ("none", "ieee"):
        return _NOTHING
    settings = torch.backends.cuda.matmul if on_gpu else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return _precision_set_to(settings, wanted)


_NOTHING = contextlib.nullcontext()
