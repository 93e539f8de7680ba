"""What a chain can reach at best: block singular values, floors for every rank, hierarchical factorisation.

Split l of a chain cuts W (m × n) into M_{>l}·N_{≤l} blocks B[t, i] = W[t::M_{>l}, i·N_{>l}:(i+1)·N_{>l}] of size
M_{≤l} × N_{>l}, each of rank r_l in any chain. So with E_l² = Σ over blocks of the squared singular values beyond r_l,

    max_l E_l  ≤  min ‖W − K_1 … K_L‖_F  ≤  left-to-right hierarchical factorisation  ≤  √(Σ_l E_l²),

with equality throughout for two factors. Losses here are squared errors per output on unit inputs, ‖·‖_F² / m.

Source: Le, Zheng, Riccietti, Gribonval, "Butterfly factorization with error guarantees" (2024).
"""

from dataclasses import dataclass
from itertools import pairwise
from math import isclose

import torch

from ks.batched import empty_values
from ks.ops import chain_product
from ks.patterns import Chain, Pattern, chainability, check_patterns


@dataclass(frozen=True)
class Floor:
    """Bounds on the least loss of the chain of one rank, in squared error per output on unit inputs.

    lower: no chain of that rank is below it. upper: the loss of the hierarchical factorisation. exact: they are equal,
    so that `lower` is the optimum.
    """

    rank: int
    lower: float
    upper: float
    exact: bool


def no_floor_reason(chain: Chain) -> str | None:
    """Why a chain family has no floor, or None where it has one."""
    if chain.family == "lowrank_butterfly":
        return "neighbours in a lowrank_butterfly are not all chainable with one rank; only its rank-r SVD bounds it"
    return None


def split_blocks(weight: torch.Tensor, chain: Chain, split: int) -> torch.Tensor:
    """The blocks of split l as a view of W.

    Args:
        weight: shape (m, n).
        chain: with row and column splits.
        split: l in 1 … L − 1.
    Returns:
        shape (M_{>l}, N_{≤l}, M_{≤l}, N_{>l}).
    """
    height, outer, inner, width = chain.block_shape(split)
    return weight.reshape(height, outer, inner, width).permute(1, 2, 0, 3)


@torch.no_grad()
def tail_energies(matrices: torch.Tensor) -> torch.Tensor:
    """Σ over a batch of matrices of the squared singular values beyond the r-th, for r = 0 … min(height, width).

    They are eigenvalues of the smaller Gram matrix, in float64: the absolute error is a few times 1e-16 of the energy
    ‖·‖_F², at a third of the time of singular values.

    Args:
        matrices: shape (..., height, width), any float dtype.
    Returns:
        float64 tensor of shape (min(height, width) + 1,), not increasing, last entry 0.
    """
    height, width = matrices.shape[-2:]
    total = torch.zeros(min(height, width), dtype=torch.float64, device=matrices.device)
    for batch in matrices.reshape(-1, height, width).split(max(1, 2**22 // (height * width))):  # bounds the memory
        wide = batch.double()
        total += torch.linalg.eigvalsh(wide @ wide.mT if height <= width else wide.mT @ wide).clamp_(min=0).sum(0)
    return torch.cat([total.new_zeros(1), total.cumsum(0)]).flip(0)


@torch.no_grad()
def floor_curve(weight: torch.Tensor, chain: Chain) -> torch.Tensor:
    """Lower bound max_l E_l(r)² / m for every rank r = 0 … saturation at once (r = 0: predicting 0).

    Args:
        weight: W, shape (m, n).
        chain: with a floor (`no_floor_reason`).
    Returns:
        float64 tensor of shape (saturation rank + 1,), on the CPU.
    Raises:
        ValueError: the chain has no floor, or another shape.
    """
    _check_shape(weight, (chain.rows, chain.cols))
    if reason := no_floor_reason(chain):
        raise ValueError(f"no floor: {reason}")
    curve = torch.zeros(chain.saturation_rank + 1, dtype=torch.float64)
    for split in range(1, chain.num_splits + 1):
        tail = tail_energies(split_blocks(weight, chain, split)).cpu()
        curve[: len(tail)] = torch.maximum(curve[: len(tail)], tail)
    return curve / chain.rows


class HierarchicalLoss:
    """The loss of the left-to-right factorisation of W for any rank of a chain; the first cut's SVD serves every rank.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA.
        chain: with a floor (`no_floor_reason`).
    """

    def __init__(self, weight: torch.Tensor, chain: Chain):
        self.chain, weight = chain, weight.detach()
        self.energy = weight.double().square().sum().item()
        self.first = _split_svd(weight.double().unsqueeze(0), chain.patterns(1)[0], 1)

    def __call__(self, rank: int) -> float:
        """Squared error per output on unit inputs, ‖W − K_1 … K_L‖_F² / m."""
        patterns, ranks = self.chain.patterns(rank), self.chain.ranks(rank)
        _, remainder = _truncate(*self.first, ranks[0])
        for pattern, split_rank in zip(patterns[1:-2], ranks[1:-1]):
            _, remainder = _truncate(*_split_svd(remainder, pattern, split_rank), split_rank)
        # Left factors are orthonormal per block, so lost energies add up; the last cut's needs no singular vectors.
        lost = self.energy - remainder.square().sum().item()
        lost += tail_energies(_split_blocks(remainder, patterns[-2], ranks[-1]))[ranks[-1] :][:1].sum().item()
        return max(0.0, lost) / self.chain.rows


def loss_floor(weight: torch.Tensor, chain: Chain, ranks, curve: torch.Tensor | None = None) -> list[Floor]:
    """Bounds on the least loss for each rank.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA.
        chain: with a floor (`no_floor_reason`).
        ranks: positive integers; those above saturation have the bounds of saturation.
        curve: `floor_curve(weight, chain)` where it is known already.
    Returns:
        one `Floor` per rank, in the order given.
    Raises:
        ValueError: as `floor_curve`, or a rank that is not a positive integer.
    """
    curve = floor_curve(weight, chain) if curve is None else curve
    upper_of = HierarchicalLoss(weight, chain) if chain.num_splits > 1 else None
    floors = []
    for rank in ranks:
        chain.patterns(rank)  # checks the rank
        lower = curve[min(rank, chain.saturation_rank)].item()
        upper = max(lower, upper_of(rank)) if upper_of else lower
        exact = isclose(lower, upper, rel_tol=1e-6, abs_tol=1e-14 * curve[0].item())
        floors.append(Floor(rank, lower, upper, exact))
    return floors


@torch.no_grad()
def population_loss(weight: torch.Tensor, values) -> float:
    """Expected squared error per output ‖W − K_1 … K_L‖_F² / m on unit inputs x ~ N(0, I): exact, no sampling.

    Args:
        weight: W, shape (m, n), any float dtype.
        values: the factors, shapes (a_l, b_l, c_l, d_l), output side first; multiplied in float64.
    """
    return _residual(weight, values).square().sum().item() / weight.shape[0]


def _residual(weight: torch.Tensor, values) -> torch.Tensor:
    """W − K_1 … K_L in float64."""
    eye = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    return weight.double() - chain_product(eye, [factor.double() for factor in values], batch_last=True)


@torch.no_grad()
def sampled_loss_range(weight: torch.Tensor, values, num_samples: int) -> tuple[float, float]:
    """Where the mean squared error of a chain over a sample of unit Gaussian inputs lies but once in 10^13 times.

    With λ the eigenvalues of E Eᵀ / m, E = W − K_1 … K_L, the mean over N samples is a weighted sum of squared normal
    variables with expectation Σλ. It is within −2√(t/N)·‖λ‖₂ and +2√(t/N)·‖λ‖₂ + 2(t/N)·max λ of that with
    probability 1 − 2e^−t; here t = 30, and max λ ≤ ‖λ‖₂.

    Args:
        weight: W, shape (m, n), any float dtype.
        values: the factors, output side first.
        num_samples: N.
    Returns:
        (lowest, highest), squared error per output.
    Source: Laurent and Massart, "Adaptive estimation of a quadratic functional by model selection" (2000), lemma 1.
    """
    residual = _residual(weight, values)
    expected = residual.square().sum().item() / len(weight)
    narrow = (residual if len(residual) <= residual.shape[1] else residual.t()).float()  # four digits are plenty
    norm = (narrow @ narrow.t()).norm().item() / len(weight)
    share = 30 / num_samples
    return expected - 2 * share**0.5 * norm, expected + 2 * (share**0.5 + share) * norm


@torch.no_grad()
def factorize(weight: torch.Tensor, patterns) -> list[torch.Tensor]:
    """Left-to-right hierarchical factorisation of W into the factors of a chainable chain.

    At split l the best rank-r_l approximation of every block gives K_l (orthonormal columns per block) and what is
    left to factorise; the squared residuals of the splits add up. Optimal for two factors. Singular values tied at a
    cut leave a choice to the SVD: for more than two factors the result may depend on it.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA; the work is done in float64.
        patterns: (a, b, c, d) output side first, with a_1 = 1, d_L = 1, neighbours chainable.
    Returns:
        values of shape (a_l, b_l, c_l, d_l), output side first, dtype and device of the weight.
    Raises:
        ValueError: patterns that are not of that kind, or of another size than the weight.
    """
    patterns = check_patterns(patterns)
    _check_shape(weight, (patterns[0].rows, patterns[-1].cols))
    ranks = _chain_ranks(patterns)
    remainder = weight.double().unsqueeze(0)  # shape: (a, r·M, N), the part still to factorise of each column block
    values = []
    for pattern, rank in zip(patterns, ranks):
        left, right = _truncate(*_split_svd(remainder, pattern, rank), rank)
        values.append(left)
        remainder = right
    values.append(remainder.reshape(*patterns[-1]))
    return [_stored(factor, pattern, weight) for factor, pattern in zip(values, patterns)]


def _chain_ranks(patterns: tuple[Pattern, ...]) -> list[int]:
    if patterns[0].a != 1 or patterns[-1].d != 1:
        raise ValueError(
            f"patterns {patterns[0]} … {patterns[-1]}: the first must have a = 1 and the last d = 1 to be factorised"
        )
    ranks = []
    for left, right in pairwise(patterns):
        rank = chainability(left, right)
        if rank is None:
            raise ValueError(f"patterns {left} and {right} are not chainable: their product has no blocks of one rank")
        ranks.append(rank)
    return ranks


def _split_blocks(remainder: torch.Tensor, pattern: Pattern, rank: int) -> torch.Tensor:
    """The blocks that the cut behind one factor makes, shape (a, d, c/r, b, width); remainder of shape (a, b·d, ·)."""
    a, b, c, d = pattern
    return remainder.reshape(a, b, d, c // rank, -1).permute(0, 2, 3, 1, 4)


def _split_svd(remainder: torch.Tensor, pattern: Pattern, rank: int):
    return torch.linalg.svd(_split_blocks(remainder, pattern, rank), full_matrices=False)


def _truncate(left, singular, right, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut an SVD of blocks at a rank: values of the left factor, and the remainder that the next ones factorise."""
    a, d, inner, b, size = left.shape
    kept = min(rank, size)
    factor = left.new_zeros(a, d, inner, b, rank)
    rest = left.new_zeros(a, d, inner, rank, right.shape[-1])
    factor[..., :kept] = left[..., :kept]
    rest[..., :kept, :] = singular[..., :kept, None] * right[..., :kept, :]
    values = factor.permute(0, 3, 2, 4, 1).reshape(a, b, inner * rank, d)
    return values, rest.permute(0, 2, 3, 1, 4).reshape(a * inner, rank * d, -1)


def _stored(values: torch.Tensor, pattern: Pattern, weight: torch.Tensor) -> torch.Tensor:
    stored = empty_values(pattern, weight.device, weight.dtype)
    return stored.copy_(values)


def _check_shape(weight: torch.Tensor, expected: tuple[int, int]) -> None:
    if tuple(weight.shape) != expected:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: the chain is for {expected}")
