"""One factor by batched matrix products, on any device: a·d products of b × c matrices, read in place by their strides.

Activations are logical (features, batch) matrices, whatever their strides. Only a factor with a > 1 and d > 1 (inside a
deep butterfly), or one whose features are contiguous with d > 1, has to be copied.
"""

import contextlib

import torch

from ks.patterns import Pattern


def empty_values(pattern: Pattern, device=None, dtype=None) -> torch.Tensor:
    """Uninitialised values of shape (a, b, c, d) in the memory order (a, d, b, c) that the products read in place."""
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
    """out = K x for the K of `factor`.

    Args:
        factor: shape (a, b, c, d), any strides.
        x: shape (a·c·d, batch), any strides, or what `readable_blocks` made of it.
        out: shape (a·b·d, batch), any strides, overwritten.
        x_block_order, out_block_order: whether the features of x, or of `out`, are ordered (a, d, f) and not (a, f, d).
        precision: 'tf32' lets a CUDA device round float32 to TF32; everything else is IEEE.
    """
    a, b, c, d = factor.shape
    matrices = factor.permute(0, 3, 1, 2).reshape(a * d, b, c)
    blocks = readable_blocks(x, a, d, x_block_order)
    out_blocks = _blocks(out, a, d, out_block_order)
    with _float32_products(precision):
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
    """out = Σ over the batch of gradient ⊗ x, on the support of a factor.

    Args:
        gradient: of K x, shape (a·b·d, batch), any strides, or what `readable_blocks` made of it.
        x: shape (a·c·d, batch), any strides.
        out: shape (a, b, c, d), from `empty_values`, overwritten.
        block_order: of the features of `gradient`; precision: both as in `apply_factor`.
    """
    a, b, c, d = out.shape
    blocks = readable_blocks(gradient, a, d, block_order)
    with _float32_products(precision):
        torch.bmm(blocks, readable_blocks(x, a, d).transpose(1, 2), out=out.permute(0, 3, 1, 2).view(a * d, b, c))


def _blocks(features: torch.Tensor, a: int, d: int, block_order: bool = False) -> torch.Tensor | None:
    """(a·f·d, batch) as a view (a·d, f, batch) with a unit stride inside, or None where there is none."""
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
    """(a·f·d, batch) as (a·d, f, batch) with a unit stride inside: a view if there is one, else a copy.

    What has that shape already is returned as it is.
    """
    if features.dim() == 3:
        return features
    blocks = _blocks(features, a, d, block_order)
    if blocks is not None:
        return blocks
    if block_order or d == 1:
        return _blocks(features.contiguous(), a, d, True)
    rows, batch = features.shape
    if features.stride(0) == 1:
        by_sample = features.t().view(batch, a, -1, d).permute(1, 3, 0, 2)
        return by_sample.contiguous().view(a * d, batch, -1).transpose(1, 2)
    return features.reshape(a, -1, d, batch).transpose(1, 2).contiguous().view(a * d, -1, batch)


def _float32_products(precision: str):
    """The context in which a CUDA device multiplies float32 as told; elsewhere, and by default, IEEE."""
    return _tf32() if precision == "tf32" else contextlib.nullcontext()


@contextlib.contextmanager
def _tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
