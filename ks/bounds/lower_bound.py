"""Certified lower bounds of the least loss of a chain: simple ones for every rank, lift and shift for one rank.

A cut at split l leaves a grid of M_{>l} × N_{≤l} blocks of rank r_l, so every bound of a grid is one of the chain. With
more than two factors whose row groups G does not couple, one lift takes parts R = [√α_l R^(l)] from all splits, which
binds all their ranks at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ks.bounds.frames import LARGEST_SCALE, LEAK, Splitting, factor_of, fair_splitting, grow, remainder
from ks.bounds.lift_and_shift import Lift, Part, lift_and_shift, never, smaller_gram
from ks.bounds.tails import tail_sums
from ks.chain.patterns import Chain
from ks.moments.metric import Metric, MetricLike

# Iterations of ADMM; any number gives a valid bound, and more of them a better one.
ITERATIONS = 15  # on one grid; a tight bound takes twice as many
JOINT_ITERATIONS = 60  # on the parts of several splits
SEARCH_ITERATIONS = 8  # before the shares of the parts are changed
WIDE_ITERATIONS = 10  # on one grid of more than `WIDE` features
WIDE = 2048  # features above which only a tight bound changes the shares of the parts, in n³ operations
AFFORDABLE = 2**28  # m κ², the operations of an iteration on several splits that a bound spends unless it is tight

Expired = Callable[[], bool]


@torch.no_grad()
def simple_bounds(
    lifted: torch.Tensor, splitting: Splitting, row_groups: int, length: int, size: int = 1
) -> torch.Tensor:
    """Return lower bounds of the loss tr((W − Ŵ) C (W − Ŵ)ᵀ) of grids of blocks of rank size · r, r = 0 … length − 1.

    The largest of three bounds for each row group t, with tail_k(A) = Σ_{j>k} σ_j(A)², p column groups i and the
    notation of `ks.bounds.frames`:
    - tail_{pr}(W_t F), as W_t − Ŵ_t differs from W_t by a matrix of rank at most p r;
    - tail_r(W_t F N_i), the loss on what group i alone sees, of second moment the Schur complement of C on i;
    - Σ_i tail_r(W_t F R_i) + tail_{pr}(W_t L), with L Lᵀ = I − Σ R_i R_iᵀ: the bound of ⊕D_i and of the remainder.

    Args:
        lifted: W F, shape (m, ρ), float64.
        splitting: of F into p groups.
        row_groups: q.
    """
    rows = lifted.reshape(-1, row_groups, lifted.shape[1]).transpose(0, 1)  # shape: (q, m/q, ρ)
    single = size * torch.arange(length, device=lifted.device)
    joint = single * len(splitting.frames)
    best = _tails_at(rows, joint)
    for frame in splitting.frames:
        best = torch.maximum(best, _tails_at(rows @ frame, single))
    parts, rest = splitting.parts()
    together = sum((_tails_at(rows @ part, single) for part in parts), _tails_at(rows @ rest, joint))
    return torch.maximum(best, together).sum(0)


def _tails_at(matrices: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Return Σ_{j>r} σ_j² for every matrix of a batch and every r, shape (batch, len(ranks))."""
    tails = tail_sums(torch.linalg.eigvalsh(smaller_gram(matrices)).clamp(min=0))
    return tails[:, ranks.clamp(max=tails.shape[1] - 1)]


def rounding_allowance(
    weight: torch.Tensor, moment: torch.Tensor | None = None, gradients: torch.Tensor | None = None
) -> float:
    """Return the rounding error taken off a lower bound: (8 ε max(m, n) + LEAK) Σ_ij G_ii W_ij² C_jj, ε = 2.2e-16.

    The first term covers the backward errors of eigenvalues and products, a few ε times the norms of their matrices;
    the second the frames, which vanish outside their group up to LEAK, counted for each side that has a second moment.
    Without one, it is I, and its frames are exact.
    """
    squares = weight.double().square()
    energy = (squares if gradients is None else squares * gradients.diagonal().to(squares)[:, None]).sum(0)
    total = (energy if moment is None else energy * moment.diagonal().to(energy)).sum().item()
    leak = LEAK * ((moment is not None) + (gradients is not None))
    return (8 * torch.finfo(torch.float64).eps * max(weight.shape) + leak) * total


def binding_splits(chain: Chain, rank: int) -> list[int]:
    """Return the splits l whose blocks, of size M_{≤l} × N_{>l}, can have a higher rank than r."""
    shapes = {split: chain.block_shape(split) for split in range(1, chain.num_splits + 1)}
    return [split for split, (height, _, _, width) in shapes.items() if rank < min(height, width)]


@dataclass(frozen=True)
class Grid:
    """What one split makes of a chain: blocks L_Tᵀ Jᵀ W F R_S of `lifted` = Jᵀ W F, the parts those of two splittings.

    Where G couples none of the q row groups, `lifted` is G^{1/2} W F, and `rows` is None.
    """

    lifted: torch.Tensor
    row_groups: int
    splitting: Splitting
    rows: Splitting | None

    def simple(self, length: int) -> torch.Tensor:
        """Return the largest of the simple bounds of the grid for every rank 0 … length − 1."""
        if self.rows is None:
            return simple_bounds(self.lifted, self.splitting, self.row_groups, length)
        bounds = [
            simple_bounds(self.lifted, self.splitting, 1, length, self.row_groups),
            simple_bounds(self.lifted.mT, self.rows, 1, length, len(self.splitting.frames)),
        ]
        parts, rest = self.rows.parts()
        bounds.append(simple_bounds(rest.mT @ self.lifted, self.splitting, 1, length, self.row_groups))
        for part in parts:
            bounds[-1] += simple_bounds(part.mT @ self.lifted, self.splitting, 1, length)
        return torch.stack(bounds).amax(0)


class CoupledLowerBound:
    """Lower bounds of tr(G (W − Ŵ) C (W − Ŵ)ᵀ) for inputs that couple column groups and a G that may couple row groups.

    For each split, C costs about 15 n³ operations once, `simple` about 8 m n² and some eigendecompositions for all
    ranks, and one rank about 60 m n² (4 times as many where p r < m/q) and, up to `WIDE` features, 20 n³. Where G
    couples row groups, G costs 15 m³ more, and `simple` and one rank up to four times as much.

    Args:
        weight: W, shape (m, n), float64.
        chain: with a floor.
        metric: G ⊗ C, or C alone; both may be singular.
    """

    def __init__(self, weight: torch.Tensor, chain: Chain, metric: MetricLike):
        metric = Metric.of(metric)
        moment = metric.inputs.matrix_of(weight.shape[1]).to(weight.device)
        self.chain = chain
        self.factor = factor_of(moment)
        self.lifted = metric.weighted(weight) @ self.factor
        gradients = None if metric.outputs.is_isotropic else metric.outputs.matrix
        self.allowance = rounding_allowance(weight, moment, gradients)
        shapes = (chain.block_shape(split) for split in range(1, chain.num_splits + 1))
        self.grids = [self._prepared(weight, metric, q, p) for _, q, p, _ in shapes]

    def _prepared(self, weight: torch.Tensor, metric: Metric, row_groups: int, column_groups: int) -> Grid:
        splitting = fair_splitting(self.factor, column_groups)
        if not metric.couples_rows(row_groups):
            return Grid(self.lifted, row_groups, splitting, None)
        factor = factor_of(metric.rows_in_groups(row_groups).matrix.to(weight.device))
        rows = weight.reshape(-1, row_groups, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
        return Grid(factor.mT @ rows @ self.factor, row_groups, splitting, fair_splitting(factor, row_groups))

    @cached_property
    def simple(self) -> torch.Tensor:
        """The largest simple bound for every rank 0 … saturation, float64 on the CPU."""
        curves = [grid.simple(self.chain.saturation_rank + 1) for grid in self.grids]
        curve = (torch.stack(curves).amax(0) - self.allowance).clamp(min=0).cpu()
        curve[0] = max(curve[0].item(), self.lifted.square().sum().item())
        return curve

    def __call__(self, rank: int, tight: bool = False, expired: Expired = never) -> float:
        """Return the best lower bound for one rank; once `expired` returns true, the best so far, even a simple one.

        A tight bound takes longer: each row group divides the parts in its own way, in more rounds, and splits are
        joined at any cost, both only where G couples no row groups; else there are more rounds.
        """
        if rank >= self.chain.saturation_rank:
            return 0.0
        binding = binding_splits(self.chain, rank)
        values = [0.0]
        for split in binding:
            if not expired():
                values.append(self._grid(rank, self.grids[split - 1], tight, expired))
        if len(binding) > 1 and not expired() and all(grid.rows is None for grid in self.grids):
            values.append(self._joint(rank, binding, tight, expired))
        return max(self.simple[rank].item(), max(values) - self.allowance, 0.0)

    def _grid(self, rank: int, grid: Grid, tight: bool, expired: Expired) -> float:
        if tight:
            alone = [grid]
            if grid.rows is None:
                rows = (grid.lifted[t :: grid.row_groups] for t in range(grid.row_groups))
                alone = [replace(grid, lifted=each, row_groups=1) for each in rows]
            # No loss is negative, so the sum over some of the row groups is a bound too.
            return sum(_grid_bound(each, rank, 3, 2 * ITERATIONS, expired) for each in alone if not expired())
        rounds, iterations = (2, ITERATIONS) if len(self.factor) <= WIDE else (0, WIDE_ITERATIONS)
        return _grid_bound(grid, rank, rounds, iterations, expired)

    def _joint(self, rank: int, binding: list[int], tight: bool, expired: Expired) -> float:
        scale = len(binding) ** -0.5
        parts = [
            Part(scale * frame, 1, self.grids[split - 1].row_groups)
            for split in binding
            for frame in self.grids[split - 1].splitting.parts()[0]
        ]
        # Ŵ[t::q] has rank at most p r for every split: the smallest of these ranks binds the remainder.
        groups = ((len(grid.splitting.frames), grid.row_groups) for grid in self.grids)
        limits = [(p * rank * q, p, q) for p, q in groups if p * rank * q < len(self.lifted)]
        if limits and (rest := remainder([part.frame for part in parts], self.factor)) is not None:
            _, p, q = min(limits)
            parts.append(Part(rest, p, q))
        return joint_bound(self.lifted, parts, rank, tight, expired)


def joint_bound(lifted: torch.Tensor, parts: list[Part], rank: int, tight: bool, expired: Expired = never) -> float:
    """Return the bound of parts from several splits; 0 without `tight` if an iteration is not `AFFORDABLE`."""
    parts = [part for part in parts if part.frame.shape[1]]
    width = sum(part.frame.shape[1] for part in parts)
    if not parts or not (tight or len(lifted) * width**2 <= AFFORDABLE):
        return 0.0
    return lift_and_shift(lifted, Lift(parts), rank, JOINT_ITERATIONS, 1e-3, expired)[0]


def isotropic_joint_bound(
    weight: torch.Tensor, chain: Chain, rank: int, tight: bool = False, expired: Expired = never
) -> float:
    """Return a lower bound of ‖W − Ŵ‖_F² that binds the ranks of all splits at once; 0 if not affordable, as above."""
    binding = binding_splits(chain, rank)
    if len(binding) < 2:
        return 0.0
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device) * len(binding) ** -0.5
    grids = [chain.block_shape(split)[1:3] for split in binding]
    parts = [Part(frame, 1, q) for q, p in grids for frame in eye.chunk(p, 1)]
    return max(0.0, joint_bound(weight, parts, rank, tight, expired) - rounding_allowance(weight))


def _grid_bound(grid: Grid, rank: int, rounds: int, iterations: int, expired: Expired) -> float:
    """Return the largest of the bounds of a grid before and after each round that changes the shares of the parts."""
    q, p = grid.row_groups, len(grid.splitting.frames)
    height, width = len(grid.lifted) // q, grid.lifted.shape[1] // p
    splitting, rows = grid.splitting.wider_than(rank), grid.rows and grid.rows.wider_than(rank)
    best = 0.0
    for step in range(rounds + 1):
        parts = _parts(splitting, p, p * rank < height, q if rows is None else 1)
        row_parts = [] if rows is None else _parts(rows, q, q * rank < width)
        last = step == rounds
        steps = iterations if last else SEARCH_ITERATIONS
        value, slopes, row_slopes = lift_and_shift(grid.lifted, Lift(parts, row_parts), rank, steps, expired=expired)
        best = max(best, value)
        if last or (len(parts) == 1 and len(row_parts) <= 1) or expired():
            break
        kept = 0.8 if step < 2 else 0.9
        splitting = _regrown(splitting, slopes, kept)
        rows = rows and _regrown(rows, row_slopes, kept)
    return best


def _parts(splitting: Splitting, groups: int, with_rest: bool, row_groups: int = 1) -> list[Part]:
    """Return the parts of a splitting, and the remainder, of `groups` times their rank, if asked for or alone."""
    frames, rest = splitting.parts()
    parts = [Part(frame, 1, row_groups) for frame in frames if frame.shape[1]]
    return [*parts, Part(rest, groups, row_groups)] if with_rest or not parts else parts


def _regrown(splitting: Splitting, slopes: list[torch.Tensor], kept: float) -> Splitting:
    """Return the splitting with the shares D_i · kept and the rest of them handed out by the slopes of the bound."""
    if not splitting.frames:
        return splitting
    return grow(splitting.scaled(kept), (0.6, 0.6, LARGEST_SCALE), [kept * slope for slope in slopes])
