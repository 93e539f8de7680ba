"""Lower bounds of coupled inputs for every rank at once, from sums of squared singular values."""

import torch

from ks.bounds.frames import Splitting, remainder


@torch.no_grad()
def simple_bounds(lifted: torch.Tensor, splitting: Splitting, row_groups: int, length: int) -> torch.Tensor:
    """Return lower bounds of the loss tr((W − Ŵ) C (W − Ŵ)ᵀ) of grids of blocks of rank r = 0 … length − 1.

    The largest of three bounds for each row group t, with tail_k(A) = Σ_{j>k} σ_j(A)², p column groups i and the
    notation of `ks.bounds.frames`:
    - tail_{pr}(W_t F), as W_t − Ŵ_t differs from W_t by a matrix of rank at most p r;
    - tail_r(W_t F N_i), the loss on what group i alone sees, of second moment the Schur complement of C on i;
    - Σ_i tail_r(W_t F R_i) + tail_{pr}(W_t L), with L Lᵀ = I − Σ R_i R_iᵀ: the bound of ⊕D_i and of the remainder.

    Args:
        lifted: W F, shape (m, ρ), float64.
        splitting: of F into p groups.
        row_groups: q.
        length: number of ranks.
    Returns:
        float64 tensor of shape (length,).
    """
    rows = lifted.reshape(-1, row_groups, lifted.shape[1]).transpose(0, 1)  # shape: (q, m/q, ρ)
    single = torch.arange(length, device=lifted.device)
    joint = single * len(splitting.frames)
    best = _tails(rows, joint)
    for frame in splitting.frames:
        best = torch.maximum(best, _tails(rows @ frame, single))
    parts = splitting.parts()
    rest = remainder(parts, splitting.factor)
    assert rest is not None
    together = sum((_tails(rows @ part, single) for part in parts), _tails(rows @ rest, joint))
    return torch.maximum(best, together).sum(0)


def _tails(matrices: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Return Σ_{j>r} σ_j² for every matrix of a batch and every r, shape (batch, len(ranks))."""
    height, width = matrices.shape[-2:]
    gram = matrices @ matrices.mT if height <= width else matrices.mT @ matrices
    energies = torch.linalg.eigvalsh(gram).clamp(min=0)
    tails = torch.cat([energies.new_zeros(len(energies), 1), energies.cumsum(1)], 1).flip(1)
    return tails[:, ranks.clamp(max=tails.shape[1] - 1)]
