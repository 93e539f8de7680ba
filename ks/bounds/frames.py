"""Innovation frames: the directions of coupled inputs that one column group alone sees, and how groups divide them.

Let C ⪰ F Fᵀ with F of shape (n, ρ). The frame N_i of group i is an orthonormal basis of {v : F_j v = 0 for all j ≠ i},
so F N_i vanishes outside the rows of group i, and F_i N_i N_iᵀ F_iᵀ is the Schur complement of C on group i. Frames of
two groups overlap in general. The parts R_i = N_i T_i of a *splitting* are admissible together if Σ R_i R_iᵀ ⪯ I: then
D_i = F_i R_i R_iᵀ F_iᵀ and a remainder E ⪰ 0 make up C = ⊕D_i + E, which is all that the lower bounds need.
"""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

SINGULAR_CORRELATION = 1e-11  # eigenvalues below this fraction of the largest are left out, so that C ⪰ F Fᵀ
TINY = 1e-300  # in place of 0 below a fraction
LEAK = 1e-10  # largest norm of F N_i outside group i, rows of F scaled to norm 1; other frames are not used
LARGEST_SCALE = 1 - 1e-4  # fraction of the largest admissible scale, which is known up to an eigenvalue estimate


@dataclass(frozen=True)
class Splitting:
    """The factor F of shape (n, ρ), the frames N_i of shape (ρ, k_i) and the shares T_i of shape (k_i, k_i)."""

    factor: torch.Tensor
    frames: tuple[torch.Tensor, ...]
    shares: tuple[torch.Tensor, ...]

    def parts(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the R_i = N_i T_i, scaled down until I − Σ R_i R_iᵀ = L Lᵀ is positive definite in float64, and L."""
        parts = [frame @ share for frame, share in zip(self.frames, self.shares)]
        while (rest := remainder(parts, self.factor)) is None:
            parts = [(1 - 1e-3) * part for part in parts]
        return parts, rest

    def wider_than(self, rank: int) -> "Splitting":
        """Return the splitting without the frames of at most r directions, on which a rank r binds nothing."""
        kept = [i for i, frame in enumerate(self.frames) if frame.shape[1] > rank]
        return Splitting(self.factor, tuple(self.frames[i] for i in kept), tuple(self.shares[i] for i in kept))

    def scaled(self, fraction: float) -> "Splitting":
        """Return the splitting with D_i · fraction."""
        return replace(self, shares=tuple(fraction**0.5 * share for share in self.shares))


def remainder(parts: list[torch.Tensor], factor: torch.Tensor) -> torch.Tensor | None:
    """Return L with L Lᵀ = I − Σ R_i R_iᵀ, shape (ρ, ρ); None if that is not positive definite."""
    rest = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    for part in parts:
        rest -= part @ part.mT
    cholesky, info = torch.linalg.cholesky_ex(rest)
    return None if info.item() else cholesky


def factor_of(moment: torch.Tensor) -> torch.Tensor:
    """Return F of shape (n, ρ) with F Fᵀ ⪯ C, equal to rounding if C is regular: lower triangular, ρ = n, if it is.

    Features are scaled to unit energy first, so that features of very different energy count alike.
    """
    scale = moment.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    correlation = inverse[:, None] * moment * inverse
    cholesky, info = torch.linalg.cholesky_ex(correlation)
    if not info.item() and cholesky.diagonal().square().min() > 100 * SINGULAR_CORRELATION:
        return scale[:, None] * cholesky
    eigenvalues, vectors = torch.linalg.eigh(correlation)
    kept = eigenvalues > SINGULAR_CORRELATION * eigenvalues[-1]
    return scale[:, None] * vectors[:, kept] * eigenvalues[kept].sqrt()


def fair_splitting(factor: torch.Tensor, groups: int) -> Splitting:
    """Return a splitting that gives every frame as large a share as the others allow, for any weight and rank.

    The shares start from Σ_j |N_iᵀ N_j|, a bound on the overlap in the manner of Gershgorin's circles (|A| = (A
    Aᵀ)^{1/2}; [[|A|, A], [Aᵀ, |Aᵀ|]] is positive semi-definite); two more passes hand out the remainder.
    """
    frames = _frames(factor, groups)
    splitting = Splitting(factor, frames, tuple(_eye(frame.shape[1], factor) for frame in frames))
    if not any(frame.shape[1] for frame in frames):
        return splitting
    stacked = torch.cat(frames, 1)
    shares = _share(stacked.mT @ stacked, _cuts(frames), 0.9, None)
    return grow(replace(splitting, shares=tuple(shares)), (0.9, LARGEST_SCALE))


def grow(splitting: Splitting, passes: tuple[float, ...], slopes: list[torch.Tensor] | None = None) -> Splitting:
    """Hand out the remainder E of a splitting among its parts, a fraction of the admissible amount in every pass.

    Args:
        splitting: admissible.
        passes: the fractions.
        slopes: A_i of shape (k_i, k_i), how much the bound gains by D_i, in coordinates of R_i; directions of large
            slope get more. Equal shares if not given.
    """
    shares, cuts = list(splitting.shares), _cuts(splitting.frames)
    stacked = torch.cat([frame @ share for frame, share in zip(splitting.frames, shares)], 1)
    overlap = stacked.mT @ stacked  # Rᵀ R
    eye = _eye(len(overlap), overlap)
    for fraction in passes:
        cholesky, info = torch.linalg.cholesky_ex(eye - overlap)
        while info.item():
            shares, overlap = [0.9975 * share for share in shares], 0.9975**2 * overlap
            cholesky, info = torch.linalg.cholesky_ex(eye - overlap)
        load = torch.cholesky_inverse(cholesky) - eye  # Rᵀ E⁻¹ R
        moves = [_root(_eye(len(extra), extra) + extra @ extra.mT) for extra in _share(load, cuts, fraction, slopes)]
        shares = [share @ move for share, move in zip(shares, moves)]
        overlap = _times_diagonal(_times_diagonal(overlap, moves, cuts).mT, moves, cuts)
        overlap = (overlap + overlap.mT) / 2
        slopes = slopes and [move @ slope @ move for move, slope in zip(moves, slopes)]
    return replace(splitting, shares=tuple(shares))


def _share(load: torch.Tensor, cuts, fraction: float, slopes) -> list[torch.Tensor]:
    """Return X_i such that Ξ = ⊕ X_i X_iᵀ has Ξ ⪯ fraction · load⁻¹, up to the accuracy of an eigenvalue estimate.

    In coordinates in which load_ii = I, Ξ_i = s (I + Σ_{j≠i} |load_ij|)⁻¹, or with slopes B_i in these coordinates
    Ξ_i = s B_i (B_i + 3 mean B_i)⁻¹; s is the largest admissible one.
    """
    roots = [_root(load[cut, cut], -0.5) for cut in cuts]
    if slopes is None:
        bounds = [_eye(len(root), root) for root in roots]
        for i in range(len(cuts)):
            for j in range(i + 1, len(cuts)):
                overlap = roots[i] @ load[cuts[i], cuts[j]] @ roots[j]
                bounds[i] = bounds[i] + _root(overlap @ overlap.mT)
                bounds[j] = bounds[j] + _root(overlap.mT @ overlap)
        shapes = [root @ _root(bound, -0.5) for root, bound in zip(roots, bounds)]
    else:
        shapes = []
        for root, slope in zip(roots, slopes):
            values, vectors = torch.linalg.eigh(root @ slope @ root)
            values = values.clamp(min=0)
            mean = values.mean() if len(values) else 0.0
            shapes.append(root @ (vectors * (values / (values + 3 * mean).clamp(min=TINY)).sqrt()))
    top = _largest_eigenvalue(_times_diagonal(_times_diagonal(load, shapes, cuts).mT, shapes, cuts))
    scale = (fraction / top) ** 0.5 if top > 0 else 0.0
    return [scale * shape for shape in shapes]


def _frames(factor: torch.Tensor, groups: int) -> tuple[torch.Tensor, ...]:
    """Return the N_i: of the columns of F⁻¹ if F is triangular, else from null spaces. Empty ones where they leak."""
    rows, rank = factor.shape
    width = rows // groups
    norms = factor.square().sum(1, keepdim=True).sqrt()
    unit = factor / norms.clamp(min=TINY)
    if rows == rank and not unit.triu(1).any():
        inverse = torch.linalg.solve_triangular(unit, _eye(rows, unit), upper=False)
        frames = [torch.linalg.qr(columns)[0] for columns in inverse.split(width, 1)]
    else:
        frames = []
        for i in range(groups):
            outside = torch.cat([unit[: i * width], unit[(i + 1) * width :]])
            _, singular, right = torch.linalg.svd(outside, full_matrices=True)
            frames.append(right[int((singular > 1e-12 * singular.amax()).sum()) :].mT if len(singular) else right.mT)
    for i, frame in enumerate(frames):
        leak = unit @ frame
        leak[i * width : (i + 1) * width] = 0
        if leak.norm() > LEAK:
            frames[i] = frame[:, :0]
    return tuple(frames)


def _cuts(frames) -> list[slice]:
    ends = accumulate((frame.shape[1] for frame in frames), initial=0)
    return [slice(start, end) for start, end in pairwise(ends)]


def _times_diagonal(matrix: torch.Tensor, blocks, cuts) -> torch.Tensor:
    """Return matrix · ⊕ blocks."""
    return torch.cat([matrix[:, cut] @ block for cut, block in zip(cuts, blocks)], 1)


def _eye(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _root(matrix: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    """Return a power of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp(min=TINY if power < 0 else 0) ** power) @ vectors.mT


def _largest_eigenvalue(matrix: torch.Tensor, steps: int = 40) -> float:
    """Return the largest eigenvalue of a positive semi-definite matrix; an estimate by Lanczos steps if it is large."""
    if len(matrix) <= 500:
        return torch.linalg.eigvalsh(matrix)[-1].item()
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(matrix), 1, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis /= basis.norm()
    for _ in range(steps):
        new = matrix @ basis[:, -1:]
        for _ in range(2):  # once leaves rounding errors that grow from step to step
            new = new - basis @ (basis.mT @ new)
        if new.norm() <= 1e-12 * (matrix @ basis[:, -1:]).norm():
            break
        basis = torch.cat([basis, new / new.norm()], 1)
    return torch.linalg.eigvalsh(basis.mT @ matrix @ basis)[-1].item() * (1 + 1e-4)
