"""The specification: factors as explicit dense matrices, written to be checked by eye, not to be fast."""

import torch

from ks.chain.patterns import Pattern


def support(pattern: Pattern) -> torch.Tensor:
    """Return the support I_a ⊗ 1_{b×c} ⊗ I_d as a 0/1 matrix.

    Returns:
        float64 tensor of shape (a·b·d, a·c·d).
    """
    a, b, c, d = pattern
    eye_a, ones, eye_d = (torch.eye(a), torch.ones(b, c), torch.eye(d))
    return torch.kron(torch.kron(eye_a, ones), eye_d).double()


def factor_to_dense(values: torch.Tensor) -> torch.Tensor:
    """Return the dense factor K with K[i·b·d + j·d + t, i·c·d + k·d + t] = values[i, j, k, t].

    Args:
        values: shape (a, b, c, d).
    Returns:
        tensor of shape (a·b·d, a·c·d), dtype of `values`.
    """
    a, b, c, d = values.shape
    dense = values.new_zeros(a, b, d, a, c, d)
    for i in range(a):
        for t in range(d):
            dense[i, :, t, i, :, t] = values[i, :, :, t]
    return dense.reshape(a * b * d, a * c * d)


def chain_to_dense(values: list[torch.Tensor]) -> torch.Tensor:
    """Return the dense product K_1 K_2 … K_L, in the dtype of the values.

    Args:
        values: one tensor of shape (a_l, b_l, c_l, d_l) per factor, output side first.
    Returns:
        tensor of shape (m, n).
    """
    product = factor_to_dense(values[0])
    for factor in values[1:]:
        product = product @ factor_to_dense(factor)
    return product
