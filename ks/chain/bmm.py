"""The product of many small matrices by torch.bmm, and the views in which a factor of a chain is such a product."""

from collections.abc import Sequence

import torch


def empty_values(pattern: Sequence[int], device=None, dtype=None) -> torch.Tensor:
    """Return uninitialised values of shape (a, b, c, d), in the memory order (a, d, b, c).

    Products with the batch behind the features read and write this order best: a training step at rank 64 takes 0.8 of
    the time that it takes in the order of `ks.layer.KSLinear`, whose batch is in front.
    """
    a, b, c, d = pattern
    return torch.empty(a, d, b, c, device=device, dtype=dtype).permute(0, 2, 3, 1)


def feature_blocks(features: torch.Tensor, a: int, d: int, block_order: bool = False) -> torch.Tensor:
    """Return features of shape (a·f·d, batch) as a view of shape (a, d, f, batch).

    Args:
        block_order: whether they are ordered (a, d, f), and not (a, f, d).
    """
    rows, batch = features.shape
    if block_order or d == 1:
        return features.view(a, d, rows // (a * d), batch)
    return features.view(a, rows // (a * d), d, batch).transpose(1, 2)


def multiply(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None, accumulate: bool = False
) -> torch.Tensor:
    """Return left[i, t] @ right[i, t] for all i and t, shape (a, d, m, n).

    Args:
        left, right: shapes (a, d, m, k) and (a, d, k, n), any strides. An operand is copied where torch.bmm cannot
            read it: without one stride over all (i, t), or without a stride of 1 inside.
        out: a place for the product, any strides; it is converted to its dtype. None for a contiguous one.
        accumulate: add the product to `out`.
    """
    a, d, m, _ = left.shape
    if out is None:
        return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).view(a, d, m, right.shape[3])
    left, right = _readable(left), _readable(right)
    is_view = a == 1 or d == 1 or out.stride(0) == d * out.stride(1)
    if not is_view or out.dtype != left.dtype or 1 not in out.stride()[2:]:
        product = torch.bmm(left, right).view(out.shape)
        return out.add_(product) if accumulate else out.copy_(product)
    place = out.flatten(0, 1)
    if out.stride(2) == 1:
        # Half precision on a CPU is 100 times slower into an out that is not contiguous inside.
        place, left, right = place.mT, right.mT, left.mT
    torch.baddbmm(place, left, right, beta=float(accumulate), out=place)
    return out


def _readable(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices (a, d, x, y) as (a·d, x, y) with a unit stride inside: a view if possible, else a copy."""
    if 1 not in matrices.stride()[2:]:
        # The copy reads memory in its order as far as it can.
        swap = matrices.stride(2) < matrices.stride(3)
        matrices = matrices.mT.contiguous().mT if swap else matrices.contiguous()
    return matrices.flatten(0, 1)


class float32_products:
    """A context in which float32 products on the device of x are IEEE, or TF32 if asked for on a GPU, whatever torch's
    global setting."""

    def __init__(self, x: torch.Tensor, precision: str = "ieee"):
        self._settings = torch.backends.cuda.matmul if x.is_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        self._wanted = "tf32" if x.is_cuda and precision == "tf32" else "ieee"
        self._applies = x.dtype == torch.float32

    def __enter__(self) -> None:
        if self._applies:
            self._before = self._settings.fp32_precision
            self._settings.fp32_precision = self._wanted

    def __exit__(self, *error) -> None:
        if self._applies:
            self._settings.fp32_precision = self._before
