"""Descent over the factors of a chain for coupled inputs: a local optimum near a given chain of any length.

With P = K_1 … K_{l-1} and Q = K_{l+1} … K_L, the loss tr((W − P K_l Q) C (W − P K_l Q)ᵀ) is quadratic in K_l. Its block
(i, t), a b × c matrix, has the curvature (P_iᵀP_i)_t ⊗ (Q_i C Q_iᵀ)_t, and blocks of different t do not interact. So
the exact step of block i, for all t at once, is  Δ = (P_iᵀP_i)⁺ · P_iᵀ (W − Ŵ) C Q_iᵀ · (Q_i C Q_iᵀ)⁺, and no step
raises the loss.
"""

import torch

from ks.chain.product import chain_product

MAX_FACTOR_SWEEPS = 50  # for the worst case; each costs 4 m n² operations and more
FACTOR_TOLERANCE = 1e-4  # relative progress of a sweep at which the descent ends
PINV_RTOL = 1e-12  # of the largest eigenvalue, in pseudo-inverses of curvatures in float64


@torch.no_grad()
def refine_factors(
    weight: torch.Tensor,
    moment: torch.Tensor,
    values: list[torch.Tensor],
    max_sweeps: int = MAX_FACTOR_SWEEPS,
    tolerance: float = FACTOR_TOLERANCE,
) -> tuple[list[torch.Tensor], list[float]]:
    """Improve a chain factor by factor, block by block.

    A sweep costs about 4 m n² operations and, for inner widths w, 2 m n w + w³ more for each factor.

    Args:
        weight: W, shape (m, n), float64.
        moment: C, shape (n, n), float64.
        values: the factors, shapes (a_l, b_l, c_l, d_l), output side first, float64.
        max_sweeps, tolerance: end of the descent.
    Returns:
        the factors, and the loss before the first and after each sweep, not increasing.
    """
    outputs = weight @ moment  # W C
    best, history = list(values), [_loss(weight, moment, values)]
    for _ in range(max_sweeps):
        trial = list(best)
        for index in range(len(trial)):
            trial[index] = trial[index] + _step(outputs, moment, trial, index)
        loss = _loss(weight, moment, trial)
        if not loss <= history[-1]:
            break  # at the accuracy of float64
        best, progress = trial, history[-1] - loss
        history.append(loss)
        if progress <= tolerance * loss:
            break
    return best, history


def _step(outputs: torch.Tensor, moment: torch.Tensor, values: list[torch.Tensor], index: int) -> torch.Tensor:
    """Return the change of one factor, shape (a, b, c, d), by exact steps of its blocks i = 0 … a − 1 in turn."""
    a, b, c, d = values[index].shape
    rows, cols = outputs.shape
    before = _dense(values[:index], rows, moment).reshape(-1, d, a, b, d)
    before = before.diagonal(dim1=1, dim2=4).permute(3, 1, 0, 2)  # P, shape: (d, a, m/d, b); other entries are zero
    after = _dense(values[index + 1 :], cols, moment).reshape(a, c, d, cols)
    after = after.permute(2, 0, 1, 3).reshape(d, a * c, cols)  # Q
    weighted = after @ moment
    gram = weighted @ after.mT  # Q C Qᵀ, shape: (d, a c, a c)
    blocks = values[index].permute(3, 0, 1, 2)  # shape: (d, a, b, c)
    product = (before @ blocks).transpose(1, 2).reshape(d, -1, a * c)  # P K, shape: (d, m/d, a c)
    # W C Qᵀ − P K Q C Qᵀ; (M d) n -> d M n
    slope = outputs.reshape(-1, d, cols).transpose(0, 1) @ after.mT - product @ gram
    change = torch.zeros_like(blocks)
    for i in range(a):
        own = slice(i * c, (i + 1) * c)
        left = torch.linalg.pinv(before[:, i].mT @ before[:, i], rtol=PINV_RTOL, hermitian=True)
        right = torch.linalg.pinv(gram[:, own, own], rtol=PINV_RTOL, hermitian=True)
        change[:, i] = left @ (before[:, i].mT @ slope[:, :, own]) @ right
        slope = slope - before[:, i] @ (change[:, i] @ gram[:, own])
    return change.permute(1, 2, 3, 0)


def _dense(values: list[torch.Tensor], size: int, like: torch.Tensor) -> torch.Tensor:
    """Return the product of some factors as a matrix; the identity of a size for none."""
    if not values:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    a, _, c, d = values[-1].shape
    return chain_product(torch.eye(a * c * d, dtype=like.dtype, device=like.device), values, batch_last=True)


def _loss(weight: torch.Tensor, moment: torch.Tensor, values: list[torch.Tensor]) -> float:
    error = weight - _dense(values, 0, moment)
    return ((error @ moment) * error).sum().item()
