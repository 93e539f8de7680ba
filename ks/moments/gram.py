"""Gram matrices at half the cost of a plain product: only the lower triangle is computed; whether a matrix is one."""

import torch

from ks.moments.pieces import in_pieces


def lower_gram(matrix: torch.Tensor) -> torch.Tensor:
    """Return the lower triangle of A Aᵀ.

    Panels of rows meet the rows up to their own. Cholesky factors and eigenvalues read no more than the lower triangle.

    Args:
        matrix: A, shape (..., rows, cols), any strides.
    Returns:
        tensor of shape (..., rows, rows); above the diagonal it is 0 or, near the diagonal, that of A Aᵀ. On a CPU its
        bits do not depend on the number of threads.
    """
    rows = matrix.shape[-2]
    gram = matrix.new_zeros(*matrix.shape[:-1], rows)

    def compute(panel: slice) -> None:
        torch.matmul(matrix[..., panel, :], matrix[..., : panel.stop, :].mT, out=gram[..., panel, : panel.stop])

    in_pieces(compute, rows, matrix.device)
    return gram


def is_semi_definite(matrix: torch.Tensor, tolerance: float) -> bool:
    """Return whether no eigenvalue is below −tolerance; a Cholesky factorisation takes a tenth of the eigenvalues'.

    Args:
        matrix: symmetric, shape (n, n), float64.
        tolerance: positive.
    """
    shifted = matrix.clone()
    shifted.diagonal().add_(tolerance)
    return torch.linalg.cholesky_ex(shifted).info.item() == 0
