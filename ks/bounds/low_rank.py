"""Low-rank chains: the optimum of every rank from one eigenproblem of the smaller side.

With A = G^{1/2} W C^{1/2} and λ the eigenvalues of its smaller Gram matrix, the least loss tr(G E C Eᵀ) of rank r is
Σ_{k>r} λ_k.

- m ≤ n: A Aᵀ = G^{1/2} W C Wᵀ G^{1/2} = U Λ Uᵀ, and Ŵ = (G^{-1/2} U_r)(U_rᵀ G^{1/2} W). No root of C is needed.
- m > n: AᵀA = C^{1/2} Wᵀ G W C^{1/2} = V Λ Vᵀ, and Ŵ is the projection of W, orthogonal for G, on the columns of
  W C^{1/2} V_r. No root of G is needed, and no inverse of C.

Source: Swift-SVD (arXiv 2604.01609), theorem 3.1, for G = I and m ≤ n.
"""

import torch

from ks.bounds.tails import tail_sums
from ks.moments.metric import Metric


@torch.no_grad()
def low_rank_energies(weight: torch.Tensor, metric: Metric) -> torch.Tensor:
    """Return the least tr(G E C Eᵀ) of low-rank chains, r = 0 … min(m, n).

    Args:
        weight: W, shape (m, n), any float dtype.
        metric: G ⊗ C.
    Returns:
        float64 tensor of shape (min(m, n) + 1,), not increasing, last entry 0.
    """
    return tail_sums(torch.linalg.eigvalsh(_smaller_gram(weight, metric)).clamp_(min=0))


@torch.no_grad()
def low_rank_factors(weight: torch.Tensor, metric: Metric, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left and right of the best chain left · right of a rank.

    Args:
        weight: W, shape (m, n), any float dtype.
        metric: G ⊗ C.
        rank: r, clipped at min(m, n).
    Returns:
        float64 tensors of shapes (m, r) and (r, n).
    """
    vectors = torch.linalg.eigh(_smaller_gram(weight, metric)).eigenvectors[:, -rank:].flip(1)
    if weight.shape[0] <= weight.shape[1]:
        return metric.unweighted(vectors), vectors.mT @ metric.weighted(weight)
    basis = torch.linalg.qr(metric.inputs.times_root(weight) @ vectors)[0]
    right = basis.mT @ weight.double()
    if not metric.outputs.is_isotropic:
        weighted = basis.mT @ metric.outputs.matrix.to(basis.device)  # Qᵀ G
        missing = weighted @ (weight - basis @ right)
        right += torch.linalg.pinv(weighted @ basis, hermitian=True) @ missing
    return basis, right


@torch.no_grad()
def low_rank_energies_in(weight: torch.Tensor, metric: Metric, other: Metric) -> torch.Tensor:
    """Return the tr(H E C Eᵀ) of the low-rank chains that are optimal in G ⊗ C, r = 0 … min(m, n).

    With A = G^{1/2} W C^{1/2} it is Σ_{k>r} λ_k u_kᵀ G^{-1/2} H G^{-1/2} u_k, and also Σ_{k>r} b_kᵀ H b_k for
    b_k = W C^{1/2} v_k. What those chains leave at full rank, where G is singular, is added: exact for H = I.

    Args:
        weight: W, shape (m, n), any float dtype.
        metric: G ⊗ C.
        other: H ⊗ C, with the same C.
    Returns:
        float64 tensor of shape (min(m, n) + 1,), not increasing.
    """
    energies, vectors = torch.linalg.eigh(_smaller_gram(weight, metric))
    if weight.shape[0] <= weight.shape[1]:
        left = metric.unweighted(vectors)
        lost = other.loss(weight - left @ (vectors.mT @ metric.weighted(weight)))
        columns = left * energies.clamp(min=0).sqrt()
    else:
        lost, columns = 0.0, metric.inputs.times_root(weight) @ vectors
    return lost + tail_sums(other.outputs.output_moment(columns.mT).diagonal().clamp(min=0))


def _smaller_gram(weight: torch.Tensor, metric: Metric) -> torch.Tensor:
    """Return the lower triangle of A Aᵀ for m ≤ n, else that of AᵀA."""
    if weight.shape[0] <= weight.shape[1]:
        return metric.inputs.output_moment(metric.weighted(weight))
    return metric.outputs.output_moment(metric.inputs.times_root(weight).mT)
