"""The lift-and-shift bound: a certified lower bound of the least loss of a chain under a metric G ⊗ C.

Theorem. Let C ⪰ F Fᵀ and G ⪰ E Eᵀ. Let L = [L_T] and R = [R_S] have Σ L_T L_Tᵀ ⪯ I and Σ R_S R_Sᵀ ⪯ I, such that each
admissible Ŵ has blocks of rank k_TS in L_Tᵀ Eᵀ Ŵ F R_S, and let K Q = LᵀL Q RᵀR. Then for every matrix Q, with
P = Q − K Q,

    min tr(G (W − Ŵ) C (W − Ŵ)ᵀ)  ≥  Σ_TS tail_{k_TS}((Lᵀ Eᵀ W F R − P)_TS) − ⟨Q, P⟩,

where tail_k sums the squared singular values beyond the k-th of every block. For G = I, E = L = I, and the rows t::q of
row group t take the place of the parts L_T. docs/theory.md holds the proof. The right side is concave in Q;
`lift_and_shift` looks for its maximum by ADMM on the dual, a semi-definite relaxation of the chain.
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
    """One R_S of shape (ρ, κ_S), or one L_T: blocks L_Tᵀ Eᵀ Ŵ F R_S of every admissible Ŵ have at most the rank r times
    the sizes of both. For L = I, blocks Ŵ[t::row_groups] F R_S have at most the rank r · size.
    """

    frame: torch.Tensor
    size: int
    row_groups: int = 1


class Lift:
    """The map A ↦ Lᵀ A R, and its blocks.

    Args:
        parts: of R, with Σ R_S R_Sᵀ ⪯ I.
        rows: of L, with Σ L_T L_Tᵀ ⪯ I; none for L = I.
    """

    def __init__(self, parts: Sequence[Part], rows: Sequence[Part] = ()):
        self.parts, self.rows = parts, rows
        self.frames = [torch.cat([part.frame for part in side], 1) for side in (parts, rows) if side]  # R, L
        self.grams = [frame.mT @ frame for frame in self.frames]

    def __call__(self, lifted: torch.Tensor) -> torch.Tensor:
        """Return Lᵀ A R of A = Eᵀ W F."""
        target = lifted @ self.frames[0]
        return self.frames[1].mT @ target if self.rows else target

    def blocks(self, matrix: torch.Tensor) -> list[list[tuple[torch.Tensor, int]]]:
        """Return the blocks of Lᵀ A R for every R_S: a batch for every L_T, or the only one, with its rank over r."""
        heights = [part.frame.shape[1] for part in self.rows] or [len(matrix)]
        sizes = [part.size for part in self.rows] or [1]
        return [
            [
                (_rows_in_groups(band, part.row_groups), size * part.size)
                for band, size in zip(columns.split(heights), sizes, strict=True)
            ]
            for part, columns in zip(self.parts, matrix.split([part.frame.shape[1] for part in self.parts], 1))
        ]

    def bound(self, target: torch.Tensor, rank: int, shift: torch.Tensor) -> float:
        """Return the right side of the theorem for the target Lᵀ Eᵀ W F R and the shift Q."""
        outside = shift - _times(shift, self.grams)  # P
        value = -(outside * shift).sum().item()
        for bands in self.blocks(target - outside):
            for block, size in bands:
                energies = torch.linalg.eigvalsh(smaller_gram(block)).clamp(min=0)
                value += energies[:, : max(0, energies.shape[1] - size * rank)].sum().item()
        return value


def _times(matrix: torch.Tensor, grams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return K Q = LᵀL Q RᵀR for the Gram matrices RᵀR and LᵀL, or Q RᵀR for the first alone."""
    product = matrix @ grams[0]
    return grams[1] @ product if len(grams) > 1 else product


def never() -> bool:
    """Return False: no time limit."""
    return False


def lift_and_shift(
    lifted: torch.Tensor,
    lift: Lift,
    rank: int,
    iterations: int,
    tolerance: float = 1e-4,
    expired: Callable[[], bool] = never,
) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """Return the best lower bound of an ADMM run, and how much it gains by each part.

    Every iteration costs 2 m κ² operations, κ = Σ κ_S, and an eigendecomposition of the smaller Gram matrix of each
    block; with an L of κ_L columns, it is 2 κ_L κ (κ_L + κ).

    Args:
        lifted: Eᵀ W F, shape (ρ_L, ρ), float64; W F for L = I.
        lift: the parts.
        rank: r.
        iterations: at most so many.
        tolerance: relative progress between two evaluations at which the iteration ends.
        expired: asked after every iteration; the bound of the shift that is reached then is as valid as any.
    Returns:
        the bound, Σ of tails minus the penalty; its slope in each D_S = F R_S R_Sᵀ Fᵀ, of shape (κ_S, κ_S) in
        coordinates of R_S: where D_S may grow, larger slopes promise more; and the same for each L_T.
    """
    target = lift(lifted)
    scale = target.norm().clamp(min=torch.finfo(target.dtype).tiny)
    dtype = torch.float32 if max(map(len, lift.grams)) > FLOAT32_WIDTH else torch.float64
    aim, grams = (target / scale).to(dtype), [gram.to(dtype) for gram in lift.grams]
    best, split, dual = 0.0, aim.clone(), torch.zeros_like(aim)
    for iteration in range(1, iterations + 1):
        point = split - dual
        near = aim + _times(point - aim, grams)
        relaxed = RELAXATION * near + (1 - RELAXATION) * split
        split, blocks = _proximal(relaxed + dual + aim, lift, rank)
        dual = dual + relaxed - split
        out_of_time = expired()
        if iteration % CHECK_EVERY == 0 or iteration == iterations or out_of_time:
            value = lift.bound(target, rank, (split - dual).double() * scale - target)
            progress, best = value - best, max(best, value)
            if progress < tolerance * best or out_of_time:
                break
    return best, *_slopes(blocks, lift)


def _proximal(matrix: torch.Tensor, lift: Lift, rank: int):
    """Return argmin_Z Σ φ(Z_TS) + ‖Z − B‖², φ(Z) = min {tr ZᵀP⁻¹Z : 0 ⪯ P ⪯ I, tr P ≤ k_TS} for every block.

    The second result holds the blocks, their singular vectors and the eigenvalues of P, for `_slopes`.
    """
    blocks, columns = [], []
    for bands in lift.blocks(matrix):
        parts, kept = [], []
        for block, size in bands:
            energies, vectors = torch.linalg.eigh(smaller_gram(block))
            weights = _capped_weights(energies.clamp(min=0).sqrt(), size * rank)
            parts.append((block, vectors, weights))
            scaled = _scale_directions(block, vectors, weights / (1 + weights))
            kept.append(scaled.transpose(0, 1).reshape(-1, scaled.shape[-1]))
        blocks.append(parts)
        columns.append(torch.cat(kept))
    return torch.cat(columns, 1), blocks


def _slopes(blocks, lift: Lift) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return Σ Zᵀ(P⁻¹ − I)Z over the blocks of every part of R, and the same from the left for every part of L."""
    scaled = [
        [
            _scale_directions(block, vectors, (weights * (1 - weights)).sqrt() / (1 + weights))
            for block, vectors, weights in bands
        ]
        for bands in blocks
    ]
    columns = [torch.cat([each.reshape(-1, each.shape[-1]) for each in bands]) for bands in scaled]
    rows = [torch.cat(parts, -1)[0] for parts in zip(*scaled)] if lift.rows else []
    return [(each.mT @ each).double() for each in columns], [(each @ each.mT).double() for each in rows]


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
