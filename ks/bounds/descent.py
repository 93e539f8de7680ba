"""Descents to the best known chain for a metric G ⊗ C: local optima, whose losses are upper bounds of the least loss.

**Over the blocks of a grid.** A grid Ŵ has blocks X[t, i] = Ŵ[t::q, group i] of rank r. The loss is
tr(G (W − Ŵ) C (W − Ŵ)ᵀ). In block-whitened rows and columns, with G_tt = A_t A_tᵀ, C_ii = B_i B_iᵀ and
X̃_ti = A_tᵀ X_ti B_i, the couplings are G̃_ts = A_t⁺ G_ts A_s⁺ᵀ and C̃_ji = B_j⁺ C_ji B_i⁺ᵀ, so that G̃_tt = C̃_ii = I. With
H_ti = A_t⁺ (G W C)_ti B_i⁺ᵀ, the optimum of one block given the others is the truncated SVD of
T_ti = H_ti − Σ_{(s,j)≠(t,i)} G̃_ts X̃_sj C̃_ji. Row groups that G does not couple (G = I) are done at once. Blocks are
kept as products left · rightᵀ, so that a sweep costs about 6 r q n² + 8 r m n operations, and 2 r p q m n + 4 r p m²
more where G couples row groups. Steep spectra of G and C need many: on eigenvalues 1/k² on both sides, 30 sweeps end 5
to 20% above the loss after 200, and the best start is the truncated SVD of the blocks.

**Over the factors of a chain of any length.** With P = K_1 … K_{l-1} and Q = K_{l+1} … K_L, the loss
tr(G (W − P K_l Q) C (W − P K_l Q)ᵀ) is quadratic in K_l. Its block (i, t), a b × c matrix, has the curvature
(PᵀGP)_it ⊗ (Q C Qᵀ)_it, so its exact step is  Δ = (P_itᵀ G P_it)⁺ · P_itᵀ G (W − Ŵ) C Q_itᵀ · (Q_it C Q_itᵀ)⁺, and no
step raises the loss. Blocks of different t do not interact for G = I: then block i is done for all t at once.
"""

import torch

from ks.chain.product import chain_product
from ks.moments.metric import Metric, MetricLike

MAX_GRID_SWEEPS = 200  # for the worst case; about thirty come close on layers of MiniLM
TRIAL_SWEEPS = 6  # from each start
RANDOM_STARTS = 2  # at least; small problems get up to 6
GRID_TOLERANCE = 3e-5  # relative progress of a sweep at which the descent ends
SINGULAR_GROUP = 1e-12  # eigenvalues of C_ii below this fraction of the largest count as zero
MAX_FACTOR_SWEEPS = 50  # for the worst case; each costs 4 m n² operations and more
FACTOR_TOLERANCE = 1e-4  # relative progress of a sweep at which the descent ends
PINV_RTOL = 1e-12  # of the largest eigenvalue, in pseudo-inverses of curvatures in float64


class GridDescent:
    """Descent for one weight and metric, prepared once for all ranks in about 4 n³/p + 4 m n² operations.

    Where the metric has a G, 4 m³/q + 2 m² n more.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA; the work is done in float64.
        metric: G ⊗ C, or C alone.
        row_groups: q, a divisor of m.
        column_groups: p, a divisor of n.
    """

    def __init__(self, weight: torch.Tensor, metric: MetricLike, row_groups: int, column_groups: int):
        q, p = row_groups, column_groups
        metric, weight = Metric.of(metric), weight.double()
        self.weight = _grid_blocks(weight, q, p)  # shape: (q, p, M, k)
        moment = metric.inputs.matrix_of(weight.shape[1]).to(weight.device)
        self.coupling, self.root, self.inverse = _block_whitened(moment, p)
        products = weight @ moment  # G W C
        self.row_root = self.row_inverse = torch.eye(len(weight) // q).to(weight).expand(q, -1, -1)
        self.turns = [slice(0, q)]  # the row groups that are done at once
        if not metric.outputs.is_isotropic:
            products = metric.outputs.matrix.to(weight.device) @ products
            gradients = metric.rows_in_groups(q).matrix.to(weight.device)
            self.row_coupling, self.row_root, self.row_inverse = _block_whitened(gradients, q)
            if metric.couples_rows(q):
                self.turns = [slice(t, t + 1) for t in range(q)]
        self.target = self.row_inverse[:, None] @ _grid_blocks(products, q, p) @ self.inverse.mT  # H
        self.whitened = self.row_root.mT[:, None] @ self.weight @ self.root
        energy = (products * weight).reshape(-1, q, weight.shape[1]).sum((0, 2))
        self.energy = energy.reshape(-1, len(self.turns)).sum(1)  # of the row groups, or of all where they are coupled
        self.history: list[float] = []  # the loss after each sweep of the last descent

    def factors(
        self, rank: int, max_sweeps: int = MAX_GRID_SWEEPS, tolerance: float = GRID_TOLERANCE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Descend; return Ŵ[t::q, group i] = left[t, i] right[t, i]ᵀ.

        A few sweeps are made from each of several starts; every row group goes on from the best of them, all from the
        same one where G couples them.

        Args:
            rank: r.
            max_sweeps, tolerance: end of the descent.
        Returns:
            left of shape (q, p, M, r) and right of shape (q, p, k, r), with r clipped at min(M, k).
        """
        rank = min(rank, *self.target.shape[-2:])
        best, loss = None, torch.full_like(self.energy, float("inf"))
        for start in self._starts(rank):
            blocks, start_loss = self._sweep(start, rank)
            trial, trial_loss = self._descend(blocks, start_loss, rank, TRIAL_SWEEPS, tolerance)
            better = trial_loss < loss
            best = trial if best is None else [_choose(better, new, old) for new, old in zip(trial, best)]
            loss = torch.where(better, trial_loss, loss)
        best, _ = self._descend(best, loss, rank, max_sweeps, tolerance)
        left = torch.stack([left for left, _ in best], 1)
        right = torch.stack([right for _, right in best], 1)
        # In the null spaces of C_ii, where errors cost nothing, right is that of the projected weight.
        raw = (self.row_root.mT[:, None] @ self.weight).mT @ left
        right = self.inverse.mT @ right + (raw - self.inverse.mT @ (self.root.mT @ raw))
        return self.row_inverse.mT[:, None] @ left, right

    def _starts(self, rank: int):
        """Yield the truncated SVD of every block, zero, and projections of every block on random subspaces.

        A large problem in which G couples row groups starts from the truncated SVD alone.
        """
        own = [_best_of_rank(block, rank, None) for block in self.whitened.unbind(1)]
        yield own
        starts = min(6, 2**16 // self.weight.numel())  # small problems have worse local optima
        if len(self.turns) > 1 and not starts:
            return  # under G and C of MiniLM, random weights ended at most 0.1% lower from others, up to 1.5% higher
        yield [(left, torch.zeros_like(right)) for left, right in own]
        generator = torch.Generator().manual_seed(0)
        for _ in range(max(RANDOM_STARTS, starts)):
            noise = [torch.randn(left.shape, generator=generator, dtype=left.dtype).to(left.device) for left, _ in own]
            bases = [torch.linalg.qr(each)[0] for each in noise]
            yield [(basis, block.mT @ basis) for basis, block in zip(bases, self.whitened.unbind(1))]

    def _descend(self, now, loss: torch.Tensor, rank: int, max_sweeps: int, tolerance: float):
        """Sweep until the progress is small; return the blocks and the loss of each row group.

        A sweep starts from the extrapolation X + (X − X_before) · age / (age + 3). A row group whose loss would rise
        keeps its X and restarts at age 0, so that the loss never rises.
        """
        before, age = now, torch.zeros_like(loss)
        self.history = [loss.sum().item()]
        for _ in range(max_sweeps):
            momentum = (age / (age + 3))[:, None, None]
            start = [
                (torch.cat([left, old_left], -1), torch.cat([right * (1 + momentum), old_right * -momentum], -1))
                for (left, right), (old_left, old_right) in zip(now, before)
            ]
            trial, trial_loss = self._sweep(start, rank, now)
            better = trial_loss <= loss
            chosen = [_choose(better, new, old) for new, old in zip(trial, now)]
            before, now = [_choose(better, old, older) for old, older in zip(now, before)], chosen
            loss = torch.where(better, trial_loss, loss)
            age = torch.where(better, age + 1, torch.zeros_like(age))
            self.history.append(loss.sum().item())
            if better.all() and self.history[-2] - self.history[-1] <= tolerance * abs(self.history[-1]):
                break
        return now, loss

    def _sweep(self, start, rank: int, basis=None):
        """Give every block its optimum in turn; return the blocks and the losses, which have the shape of `energy`.

        start: per column group (left, right), shapes (q, M, ·) and (q, k, ·), in whitened rows and columns.
        basis: blocks whose left factors start the subspace iteration; `start` if not given.
        """
        blocks, loss = list(start), self.energy.clone()
        coupled = [self._coupled(block) for block in blocks]
        for i, (bases, _) in enumerate(basis or start):
            target = self.target[:, i]
            earlier, later = (
                sum(_times(coupled[j], self.coupling[j, i]).reshape(target.shape) for j in others)
                for others in (range(i), range(i + 1, len(blocks)))
            )
            own = [(blocks[i][0][rows], blocks[i][1][rows]) for rows in self.turns]
            fixed = target - earlier
            free = fixed - later
            for turn, rows in enumerate(self.turns):
                above = self._of_rows(own, turn, range(turn))
                below = self._of_rows(own, turn, range(turn + 1, len(own)))
                left, right = own[turn] = _best_of_rank(free[rows] - above - below, rank, bases[rows])
                # ‖X̃_b‖² − 2⟨H_b − Σ_{b'<b} G̃ X̃_b' C̃, X̃_b⟩, whose sum over the blocks b counts every pair of them once
                loss += right.square().sum((1, 2)) - 2 * (((fixed[rows] - above) @ right) * left).sum((1, 2))
            lefts, rights = zip(*own)
            blocks[i] = torch.cat(lefts), torch.cat(rights)
            coupled[i] = self._coupled(blocks[i])
        return blocks, loss

    def _coupled(self, block):
        """Return the factors of G̃ X̃ for the blocks X̃ of one column group, of all rows at once if G couples them."""
        if len(self.turns) == 1:
            return block
        left, right = self.row_coupling @ block[0], block[1]
        # t s M r -> 1 (t M) (s r), s k r -> 1 k (s r)
        left = left.transpose(1, 2).reshape(1, -1, right.shape[0] * right.shape[2])
        return left, right.transpose(0, 1).reshape(1, right.shape[1], -1)

    def _of_rows(self, own, turn: int, others):
        """Return Σ_s G̃_ts X̃_s over other row groups s of one column group; `own` holds the factors of all."""
        return sum((self.row_coupling[turn, s] @ own[s][0]) @ own[s][1].mT for s in others)


def root_and_inverse(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return G with C = G Gᵀ and its pseudo-inverse for a batch of moments, shape (..., k, k), float64.

    Features are scaled to unit energy before the eigendecomposition, so that those of little energy keep their digits.
    """
    scale = moments.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().unsqueeze(-1)  # shape: (..., k, 1)
    unscale = torch.where(scale > 0, 1 / scale, 0.0)
    eigenvalues, vectors = torch.linalg.eigh(unscale * moments * unscale.mT)
    kept = eigenvalues > SINGULAR_GROUP * eigenvalues[..., -1:].clamp(min=0)
    root = torch.where(kept, eigenvalues, 0).sqrt()
    inverse = torch.where(kept, eigenvalues, 1).rsqrt() * kept
    return scale * vectors * root.unsqueeze(-2), (unscale * vectors * inverse.unsqueeze(-2)).mT


def _block_whitened(moment: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return C̃_ij, shape (p, p, k, k), and the roots and inverse roots of the C_ii, for p groups of k features."""
    width = len(moment) // groups
    coupling = moment.reshape(groups, width, groups, width).transpose(1, 2)
    root, inverse = root_and_inverse(torch.stack([coupling[i, i] for i in range(groups)]))
    return inverse[:, None] @ coupling @ inverse.mT, root, inverse


def _grid_blocks(matrix: torch.Tensor, row_groups: int, column_groups: int) -> torch.Tensor:
    """Return the view of (m, n) of shape (q, p, m/q, n/p)."""
    # (M q) (p k) -> q p M k
    return matrix.reshape(-1, row_groups, column_groups, matrix.shape[1] // column_groups).permute(1, 2, 0, 3)


def _times(block, coupling: torch.Tensor) -> torch.Tensor:
    left, right = block
    if left.shape[-1] > left.shape[-2]:
        return (left @ right.mT) @ coupling
    return left @ (right.mT @ coupling)


def _choose(better: torch.Tensor, new, old):
    return tuple(torch.where(better[:, None, None], ours, theirs) for ours, theirs in zip(new, old))


def _best_of_rank(matrices: torch.Tensor, rank: int, basis: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left · rightᵀ, with orthonormal left, the best approximation of rank r that a subspace holds.

    Where the rank is small and a basis is at hand, the subspace is that of [basis, T Tᵀ basis], which is never worse
    than the basis alone; else it is the whole space.

    Args:
        matrices: T, shape (q, M, k).
        basis: shape (q, M, ·), or None.
    """
    height, width = matrices.shape[-2:]
    if basis is not None and 4 * rank <= min(height, width):
        moved = matrices @ (matrices.mT @ basis[..., :rank])
        subspace = torch.linalg.qr(torch.cat([basis[..., :rank], moved], -1))[0]
        rotation = _leading_vectors(subspace.mT @ matrices, rank)
        left = subspace @ rotation
    elif height <= width:
        left = _leading_vectors(matrices, rank)
    else:
        right = _leading_vectors(matrices.mT, rank)
        left = torch.linalg.qr(matrices @ right)[0]
    return left, matrices.mT @ left


def _leading_vectors(matrices: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the r leading left singular vectors of a batch of matrices, shape (..., height, r)."""
    return torch.linalg.eigh(matrices @ matrices.mT).eigenvectors[..., -rank:]


@torch.no_grad()
def refine_factors(
    weight: torch.Tensor,
    metric: MetricLike,
    values: list[torch.Tensor],
    max_sweeps: int = MAX_FACTOR_SWEEPS,
    tolerance: float = FACTOR_TOLERANCE,
) -> tuple[list[torch.Tensor], list[float]]:
    """Improve a chain factor by factor, block by block.

    A sweep costs about 4 m n² operations and, for inner widths w, 2 m n w + w³ more for each factor.

    Args:
        weight: W, shape (m, n), float64.
        metric: G ⊗ C, or C alone.
        values: the factors, shapes (a_l, b_l, c_l, d_l), output side first, float64.
        max_sweeps, tolerance: end of the descent.
    Returns:
        the factors, and the loss before the first and after each sweep, not increasing.
    """
    metric = Metric.of(metric)
    moment = metric.inputs.matrix_of(weight.shape[1]).to(weight.device)
    outputs = metric.weighted(weight) @ moment  # G^{1/2} W C
    best, history = list(values), [_loss(weight, metric, values)]
    for _ in range(max_sweeps):
        trial = list(best)
        for index in range(len(trial)):
            trial[index] = trial[index] + _step(outputs, moment, metric, trial, index)
        loss = _loss(weight, metric, trial)
        if not loss <= history[-1]:
            break  # at the accuracy of float64
        best, progress = trial, history[-1] - loss
        history.append(loss)
        if progress <= tolerance * loss:
            break
    return best, history


def _step(
    outputs: torch.Tensor, moment: torch.Tensor, metric: Metric, values: list[torch.Tensor], index: int
) -> torch.Tensor:
    """Return the change of one factor, shape (a, b, c, d), by exact steps of its blocks in turn.

    Blocks (i, t), i = 0 … a − 1, of all t are done at once without a G, one after the other with one.
    """
    a, b, c, d = values[index].shape
    rows, cols = outputs.shape
    together = d if metric.outputs.is_isotropic else 1
    turns = d // together
    before = metric.weighted(_dense(values[:index], rows, moment)).reshape(-1, together, a, b, turns, together)
    # P, other entries are zero; M a b turns together -> together (a turns) M b
    before = before.diagonal(dim1=1, dim2=5).permute(4, 1, 3, 0, 2).reshape(together, a * turns, -1, b)
    after = _dense(values[index + 1 :], cols, moment).reshape(a, c, turns, together, cols)
    after = after.permute(3, 0, 2, 1, 4).reshape(together, a * turns * c, cols)  # Q
    weighted = after @ moment
    gram = weighted @ after.mT  # Q C Qᵀ
    blocks = values[index].reshape(a, b, c, turns, together).permute(4, 0, 3, 1, 2).reshape(together, a * turns, b, c)
    product = (before @ blocks).transpose(1, 2).reshape(together, -1, a * turns * c)  # P K
    # W C Qᵀ − P K Q C Qᵀ; (M together) n -> together M n
    slope = outputs.reshape(-1, together, cols).transpose(0, 1) @ after.mT - product @ gram
    change = torch.zeros_like(blocks)
    for i in range(a * turns):
        own = slice(i * c, (i + 1) * c)
        left = torch.linalg.pinv(before[:, i].mT @ before[:, i], rtol=PINV_RTOL, hermitian=True)
        right = torch.linalg.pinv(gram[:, own, own], rtol=PINV_RTOL, hermitian=True)
        change[:, i] = left @ (before[:, i].mT @ slope[:, :, own]) @ right
        slope = slope - before[:, i] @ (change[:, i] @ gram[:, own])
    return change.reshape(together, a, turns, b, c).permute(1, 3, 4, 2, 0).reshape(a, b, c, d)


def _dense(values: list[torch.Tensor], size: int, like: torch.Tensor) -> torch.Tensor:
    """Return the product of some factors as a matrix; the identity of a size for none."""
    if not values:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    a, _, c, d = values[-1].shape
    return chain_product(torch.eye(a * c * d, dtype=like.dtype, device=like.device), values, batch_last=True)


def _loss(weight: torch.Tensor, metric: Metric, values: list[torch.Tensor]) -> float:
    return metric.loss(weight - _dense(values, 0, weight))
