"""Forward and backward pass of a whole chain for training steps, without autograd.

Inside, an activation is a logical (features, batch) matrix, whatever its strides; between factors it is contiguous
along the batch.
"""

import functools
from collections.abc import Sequence

import torch

from ks.chain import bmm
from ks.chain.bmm import empty_values, feature_blocks, float32_products
from ks.chain.patterns import Pattern
from ks.chain.split_grams import SplitMatrices, scale_gradient


class ChainPasses:
    """Forward and backward pass of one chain, W = K_1 … K_L.

    Args:
        patterns: (a_l, b_l, c_l, d_l) of the factors, output side first.
        batch_last: x and y have the shapes (n, batch) and (m, batch) instead of (batch, n) and (batch, m).
        block_order: leave the outputs in the order in which the left-most product makes them, features first in memory,
            which saves a permutation; `output_rows` says which one it is.
        impl: 'triton' for the kernel of this package, 'auto' or 'bmm' for torch.bmm.
        precision: of float32 products; 'tf32' rounds operands to TF32 on a GPU, everything else is IEEE.
    """

    def __init__(
        self, patterns, *, batch_last: bool = False, block_order: bool = False, impl: str = "auto", precision="ieee"
    ):
        self.patterns = tuple(Pattern(*pattern) for pattern in patterns)
        self.batch_last, self.precision = batch_last, precision
        self.block_order = block_order and self.patterns[0].d > 1  # else both orders are the same
        self._multiply = bmm.multiply
        if impl == "triton":
            from ks.chain import triton_kernels  # only where it is asked for: Triton may be missing

            self._multiply = functools.partial(triton_kernels.multiply, precision=precision)

    @property
    def output_rows(self) -> torch.Tensor:
        """The row of W behind each output feature, shape (m,), int64 on the CPU."""
        a, b, _, d = self.patterns[0]
        rows = torch.arange(a * b * d)
        return rows.view(a, b, d).transpose(1, 2).flatten() if self.block_order else rows

    def forward(self, x: torch.Tensor, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return y = x Wᵀ, with its features in the order `output_rows`, and the activations that `backward` needs.

        Args:
            x: shape (batch, n), or (n, batch) if batch_last.
            values: shapes (a_l, b_l, c_l, d_l), output side first.
        Returns:
            [y, then the input of every factor except the right-most, from left to right, each of shape
            (features, batch)]; y has the shape of x.
        """
        features = x if self.batch_last else x.t()
        inner: list[torch.Tensor] = []
        with float32_products(x, self.precision):
            for factor in values[:0:-1]:
                features = self._apply(factor, features)
                inner.insert(0, features)
            y = self._apply(values[0], features, out_block_order=self.block_order)
        if self.batch_last:
            return [y, *inner]
        return [y.t() if self.block_order else y.t().contiguous(), *inner]

    def backward(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        values: list[torch.Tensor],
        inner: list[torch.Tensor],
        *,
        for_x: bool = False,
        out: Sequence[torch.Tensor | None] | None = None,
        accumulate: bool = False,
        scaling: SplitMatrices | None = None,
    ) -> list[torch.Tensor]:
        """Return the gradients of the values, and before them that of x if `for_x`.

        Args:
            gradient: of y, in the layout and order of y.
            x, values: as given to `forward`.
            inner: the activations that it returned after y.
            out: places for the gradients of the values, in the memory order of `empty_values`, any float dtype, or the
                values themselves; None for a gradient that is not wanted.
            accumulate: add the gradients to what is there.
            scaling: matrices that multiply the gradient of every factor; with them, products are at least as precise
                as they are.
        """
        features, gradient = (x, gradient) if self.batch_last else (x.t(), gradient.t())
        out = out or [empty_values(pattern, x.device, x.dtype) for pattern in self.patterns]
        last = max(index for index, place in enumerate(out) if place is not None)
        with float32_products(x, self.precision):
            for index, entered in enumerate([*inner, features]):
                block_order, arrived = self.block_order and index == 0, gradient
                if for_x or index < last:  # before the values may change
                    gradient = self._apply(values[index].transpose(1, 2), arrived, x_block_order=block_order)
                if (place := out[index]) is not None:
                    self._values_gradient(index, arrived, entered, place, accumulate, scaling, block_order)
        found = [place for place in out if place is not None]
        return [gradient if self.batch_last else gradient.t(), *found] if for_x else found

    def _apply(
        self, factor: torch.Tensor, x: torch.Tensor, *, x_block_order: bool = False, out_block_order: bool = False
    ) -> torch.Tensor:
        """Return K x for the factor K with the given values, shape (features, batch), contiguous."""
        a, b, _, d = factor.shape
        product = self._multiply(factor.permute(0, 3, 1, 2), feature_blocks(x, a, d, x_block_order))
        return (product if out_block_order or d == 1 else product.transpose(1, 2)).reshape(a * b * d, x.shape[1])

    def _values_gradient(
        self, index, gradient, entered, out, accumulate: bool, scaling: SplitMatrices | None, block_order: bool
    ) -> None:
        """Write Σ over the batch of gradient ⊗ entered, on the support of a factor and scaled, to `out`, or add it."""
        (a, b, c, d), batch = self.patterns[index], entered.shape[1]
        left, right = scaling.beside(index) if scaling is not None else (None, None)
        for matrices in (left, right):
            if matrices is not None and matrices.dtype != entered.dtype:
                dtype = torch.promote_types(entered.dtype, matrices.dtype)
                gradient, entered = gradient.to(dtype), entered.to(dtype)
        # Activations take r multiply-adds a feature and sample, a gradient r a value: the cheaper one is multiplied.
        if left is not None and batch <= c:
            gradient, left = self._apply(left, gradient), None
        if right is not None and batch <= b:
            entered, right = self._apply(right, entered), None
        blocks = feature_blocks(gradient, a, d, block_order), feature_blocks(entered, a, d).mT
        if left is None and right is None:
            self._multiply(*blocks, out.permute(0, 3, 1, 2), accumulate)
            return
        plain = empty_values(self.patterns[index], out.device, out.dtype)
        self._multiply(*blocks, plain.permute(0, 3, 1, 2))
        scaled = scale_gradient(plain, left, right)
        out.add_(scaled) if accumulate else out.copy_(scaled)
