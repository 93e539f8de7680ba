"""The chain product as a function of x and the values of the factors, on either backend."""

from collections.abc import Sequence

import torch

from ks.chain.backend import check_impl
from ks.chain.patterns import Pattern
from ks.chain.product import blocks_of, chain_layout, multiply
from ks.chain.triton_chain import triton_product


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
        impl: 'auto' and 'bmm' for plain operations of torch, 'triton' for `ks.chain.triton_chain`.
    Returns:
        contiguous tensor of shape (..., m), or (m, ...) if batch_last.
    Raises:
        UsageError: the features of x do not match the right-most factor, dtypes differ, or an impl that cannot run.
    """
    check_impl(impl, x.device)
    layout = chain_layout(tuple(Pattern(*factor.shape) for factor in values), batch_last)
    blocks = [blocks_of(factor) for factor in values]
    return (triton_product if impl == "triton" else multiply)(x, blocks, layout, bias)
