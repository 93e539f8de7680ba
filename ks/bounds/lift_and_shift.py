"""The lift-and-shift bound: a certified lower bound of the least loss of a chain under coupled inputs.

Theorem. Let C ⪰ F Fᵀ, let every part R_S be such that each admissible Ŵ has blocks of rank k_S in Ŵ F R_S, and let
Σ R_S R_Sᵀ ⪯ I, R = [R_S], K = RᵀR. Then for every matrix Q, with P = Q (I − K),

    min tr((W − Ŵ) C (W − Ŵ)ᵀ)  ≥  Σ_S tail_{k_S}((W F R − P)_S) − tr(Q (I − K) Qᵀ),

where tail_k sums the squared singular values beyond the k-th of every block. docs/theory.md holds the proof. The right
side is concave in Q; `lift_and_shift` looks for its maximum by ADMM on the dual, a semi-definite relaxation of the
chain.
Nothing has to converge: every Q gives a valid bound, which is evaluated in float64 at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

RELAXATION = 1.6  # of ADMM; within the usual 1.5 to 1.8 of Boyd et al. (2011), 3.4.3
CHECK_EVERY = 10  # iterations between two evaluations of the bound, each of which costs as much as some iterations
FLOAT32_WIDTH = 500  # κ above which ADMM runs in float32; the bound itself is evaluated in float64


@dataclass(frozen=True)
class Part:
    """One R_S, shape (ρ, κ_S): blocks Ŵ[t::row_groups] F R_S have rank at most size · r in every admissible Ŵ."""

    frame: torch.Tensor
    size: int
    row_groups: int


def never() -> bool:
    """Return False: no time limit."""
    return False


def lift_and_shift(
    lifted: torch.Tensor,
    parts: Sequence[Part],
    rank: int,
    iterations: int,
    tolerance: float = 1e-4,
    expired: Callable[[], bool] = never,
) -> tuple[float, list[torch.Tensor]]:
    """Return the best lower bound of an ADMM run, and how much it gains by each part.

    Every iteration costs 2 m κ² operations, κ = Σ κ_S, and an eigendecomposition of the smaller Gram matrix of each
    block.

    Args:
        lifted: W F, shape (m, ρ), float64.
        parts: with Σ R_S R_Sᵀ ⪯ I.
        rank: r.
        iterations: at most so many.
        tolerance: relative progress between two evaluations at which the iteration ends.
        expired: asked after every iteration; the bound of the shift that is reached then is as valid as any.
    Returns:
        the bound, Σ of tails minus the penalty, and its slope in each D_S = F R_S R_Sᵀ Fᵀ, of shape (κ_S, κ_S) in
        coordinates of R_S: where D_S may grow, larger slopes promise more.
    """
    frames = torch.cat([part.frame for part in parts], 1)
    gram, target = frames.mT @ frames, lifted @ frames
    scale = target.norm().clamp(min=torch.finfo(target.dtype).tiny)
    dtype = torch.float32 if len(gram) > FLOAT32_WIDTH else torch.float64
    aim, projection = (target / scale).to(dtype), gram.to(dtype)
    best, split, dual = 0.0, aim.clone(), torch.zeros_like(aim)
    for iteration in range(1, iterations + 1):
        point = split - dual
        near = aim + (point - aim) @ projection
        relaxed = RELAXATION * near + (1 - RELAXATION) * split
        split, blocks = _proximal(relaxed + dual + aim, parts, rank)
        dual = dual + relaxed - split
        out_of_time = expired()
        if iteration % CHECK_EVERY == 0 or iteration == iterations or out_of_time:
            value = bound_of_shift(target, gram, parts, rank, (split - dual).double() * scale - target)
            progress, best = value - best, max(best, value)
            if progress < tolerance * best or out_of_time:
                break
    return best, _slopes(blocks)


def bound_of_shift(
    target: torch.Tensor, gram: torch.Tensor, parts: Sequence[Part], rank: int, shift: torch.Tensor
) -> float:
    """Return the right side of the theorem for the target W F R, the Gram matrix K = RᵀR and the shift Q."""
    outside = shift - shift @ gram  # P
    value, moved, start = -(outside * shift).sum().item(), target - outside, 0
    for part in parts:
        block = _rows_in_groups(moved[:, start : start + part.frame.shape[1]], part.row_groups)
        energies = torch.linalg.eigvalsh(smaller_gram(block)).clamp(min=0)
        value += energies[:, : max(0, energies.shape[1] - part.size * rank)].sum().item()
        start += part.frame.shape[1]
    return value


def _proximal(matrix: torch.Tensor, parts: Sequence[Part], rank: int):
    """Return argmin_Z Σ_S φ(Z_S) + ‖Z − B‖², φ(Z) = min {tr ZᵀP⁻¹Z : 0 ⪯ P ⪯ I, tr P ≤ k_S} for every block.

    The second result holds the blocks, their singular vectors and the eigenvalues of P, for `_slopes`.
    """
    blocks, columns, start = [], [], 0
    for part in parts:
        block = _rows_in_groups(matrix[:, start : start + part.frame.shape[1]], part.row_groups)
        start += part.frame.shape[1]
        energies, vectors = torch.linalg.eigh(smaller_gram(block))
        weights = _capped_weights(energies.clamp(min=0).sqrt(), part.size * rank)
        kept = _scale_directions(block, vectors, weights / (1 + weights))
        blocks.append((block, vectors, weights))
        columns.append(kept.transpose(0, 1).reshape(len(matrix), -1))
    return torch.cat(columns, 1), blocks


def _slopes(blocks) -> list[torch.Tensor]:
    """Return Σ over the row groups of Zᵀ(P⁻¹ − I)Z for every part."""
    slopes = []
    for block, vectors, weights in blocks:
        scaled = _scale_directions(block, vectors, (weights * (1 - weights)).sqrt() / (1 + weights))
        scaled = scaled.reshape(-1, scaled.shape[-1])
        slopes.append((scaled.mT @ scaled).double())
    return slopes


def _rows_in_groups(matrix: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the rows t::groups as a batch, shape (groups, m/groups, κ)."""
    return matrix.reshape(-1, groups, matrix.shape[1]).transpose(0, 1)


def smaller_gram(block: torch.Tensor) -> torch.Tensor:
    """Return B Bᵀ or Bᵀ B of a batch of matrices, whichever is smaller."""
    return block @ block.mT if block.shape[-2] <= block.shape[-1] else block.mT @ block


def _scale_directions(block: torch.Tensor, vectors: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scale the singular directions of a block; vectors: of the smaller Gram matrix."""
    if block.shape[-2] <= block.shape[-1]:
        return (vectors * factors.unsqueeze(-2)) @ (vectors.mT @ block)
    return ((block @ vectors) * factors.unsqueeze(-2)) @ vectors.mT


def _capped_weights(singular_values: torch.Tensor, total: int) -> torch.Tensor:
    """Return θ = clip(y σ − 1, 0, 1) with y such that Σθ = total; all ones if total ≥ their number.

    They are the eigenvalues of the optimal P of the proximal step, the squared spectral k-support norm. Σθ is piecewise
    linear in y, with kinks where y σ is 1 or 2.
    Source: McDonald, Pontil, Stamos, "Spectral k-support norm regularization" (2014).
    """
    if total >= singular_values.shape[-1]:
        return torch.ones_like(singular_values)
    largest = singular_values.amax(-1, keepdim=True)
    tiny = torch.finfo(singular_values.dtype).tiny
    sigma = singular_values.maximum(1e-12 * largest).clamp(min=tiny**0.5)
    kinks = torch.cat([1 / sigma, 2 / sigma], -1).sort(-1).values
    sums = (kinks.unsqueeze(-1) * sigma.unsqueeze(-2) - 1).clamp(0, 1).sum(-1)
    below = (sums <= total).sum(-1, keepdim=True).clamp(max=kinks.shape[-1] - 1) - 1
    start, slope = kinks.gather(-1, below), sums.gather(-1, below + 1) - sums.gather(-1, below)
    step = (total - sums.gather(-1, below)) * (kinks.gather(-1, below + 1) - start) / slope.clamp(min=tiny)
    return ((start + step) * sigma - 1).clamp(0, 1)
