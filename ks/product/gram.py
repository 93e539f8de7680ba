"""Gram matrices at half the cost of a plain product: only the lower triangle is computed."""

import torch

PANEL_ROWS = 256


def lower_gram(matrix: torch.Tensor) -> torch.Tensor:
    """Return the lower triangle of A Aᵀ.

    Panels of rows meet the rows up to their own. Cholesky factors and eigenvalues read no more than the lower triangle.

    Args:
        matrix: A, shape (..., rows, cols), any strides.
    Returns:
        tensor of shape (..., rows, rows); above the diagonal it is 0 or, near the diagonal, that of A Aᵀ.
    """
    rows = matrix.shape[-2]
    gram = matrix.new_zeros(*matrix.shape[:-1], rows)
    for start in range(0, rows, PANEL_ROWS):
        stop = min(start + PANEL_ROWS, rows)
        gram[..., start:stop, :stop] = matrix[..., start:stop, :] @ matrix[..., :stop, :].mT
    return gram
