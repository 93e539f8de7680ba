"""Whitening: of a set of samples, and of the coordinates in which a chain learns.

In these coordinates the zero predictor has a loss of 1, and the metric G ⊗ C is I on every column group of the
right-most factor and on every row group t::q of the left-most one. Neither losses nor floors nor the shape of a chain
depend on them: with C_ii = F_i F_iᵀ and G_tt = R_t R_tᵀ, x'_i = F_i⁺ (x_i − μ_i) and y'_t = R_tᵀ y_t / u turn W into
⊕R_tᵀ W ⊕F_i / u, the right-most factor into K_L ⊕F_i and the left-most one into ⊕R_tᵀ K_1, up to u. Optimizers need far
fewer steps there: inputs of real layers have conditions up to 1e9.
"""

import copy
import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ks.bounds.descent import root_and_inverse
from ks.chain.patterns import Chain
from ks.files.atomic import save_tensors
from ks.layer import KSLinear
from ks.moments.metric import LossMetric, Metric
from ks.moments.pieces import in_pieces, lower_gram, sum_of_squares
from ks.moments.second_moment import FLOAT32_ROUNDING, SecondMoment, is_semi_definite

# Values of a chain are saved in float64 where float32 would lose more than about 1e-7 of the loss: the whitening of a
# column group multiplies rounding by its condition.
LARGEST_FLOAT32_CONDITION = 1e4


@dataclass(frozen=True)
class Roots:
    """Roots F_i of the second moments F_i F_iᵀ of p groups of features, and F_i⁺, both of shape (p, n/p, n/p)."""

    root: torch.Tensor
    inverse: torch.Tensor

    @cached_property
    def condition(self) -> float:
        """The largest condition of a root."""
        squared = [torch.linalg.eigvalsh(matrices.mT @ matrices)[:, -1] for matrices in (self.root, self.inverse)]
        return (squared[0] * squared[1]).max().sqrt().item()


@dataclass(frozen=True)
class Coordinates:
    """The change of coordinates for one weight, chain family and metric.

    Args:
        unit: u.
        columns, rows: F_i and R_t, float64; None where they are the identity.
        centre: μ, shape (n,), float64; None for 0.
    """

    unit: float
    columns: Roots | None = None
    rows: Roots | None = None
    centre: torch.Tensor | None = None

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ⊕R_tᵀ W ⊕F_i / u.

        Args:
            weight: W, shape (m, n), float64; overwritten.
        """
        if self.columns is not None:
            weight = _times_block_diagonal(weight, self.columns.root)
        return self.outputs(weight).div_(self.unit)

    def outputs(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return ⊕R_tᵀ Y for a matrix Y of m rows, float64."""
        if self.rows is None:
            return matrix
        root = self.rows.root.to(matrix.device)
        return torch.einsum("tji,jtn->itn", root, matrix.unflatten(0, (-1, len(root)))).reshape(matrix.shape)

    def samples(self, samples: torch.Tensor) -> torch.Tensor:
        """Return samples x' of centred samples x, shape (N, n), float64."""
        return samples if self.columns is None else _times_block_diagonal(samples, self.columns.inverse.mT)

    def gradients(self, metric: Metric) -> torch.Tensor:
        """Return ⊕R_t⁺ G ⊕R_t⁺ᵀ, with the rows in their natural order, shape (m, m), float64."""
        assert self.rows is not None
        inverse = self.rows.inverse
        return _in_natural_order(_congruent(metric.rows_in_groups(len(inverse)).matrix, inverse), len(inverse))

    def save(self, model: KSLinear, weight: torch.Tensor, path) -> None:
        """Save a trained chain as one that acts on x and gives y.

        The unit is spread evenly over its factors. With a centre, the chain has the bias (W − Ŵ) μ.

        Args:
            model: in these coordinates.
            weight: W, shape (m, n).
            path: of the file.
        """
        outside = self.outside(model)
        if self.centre is not None:
            bias = weight.double().cpu() @ self.centre - copy.deepcopy(outside).double().cpu()(self.centre)
            outside.bias = torch.nn.Parameter(bias.to(outside.factors[0]))
        save_tensors(outside.to_payload(), path)

    @torch.no_grad()
    def outside(self, model: KSLinear) -> KSLinear:
        """Return a copy of a chain that acts on centred x and gives y, in its dtype or in float64."""
        outside, dtype = copy.deepcopy(model).double(), model.factors[0].dtype
        left, right = outside.factors[0], outside.factors[-1]
        if self.columns is not None:
            folded = right.squeeze(-1) @ self.columns.inverse.to(right.device)  # p (r q) (n/p)
            right.copy_(folded.unsqueeze(-1))
        if self.rows is not None:
            left.copy_(torch.einsum("tji,ajct->aict", self.rows.inverse.to(left.device), left))
        condition = math.prod(roots.condition for roots in (self.columns, self.rows) if roots)
        scale = self.unit ** (1 / len(outside.factors))
        for factor in outside.factors:
            factor.mul_(scale)
        precise = condition > LARGEST_FLOAT32_CONDITION or not 1e-25 < self.unit < 1e25
        return outside if precise else outside.to(dtype)


def isotropic_coordinates(weight: torch.Tensor) -> Coordinates:
    """Return the coordinates for isotropic inputs and a weight of shape (m, n); the second moment of x' is I."""
    return Coordinates((sum_of_squares(weight) / len(weight)) ** 0.5)


def measured_coordinates(
    chain: Chain, unit: float, metric: Metric, centre: torch.Tensor | None
) -> tuple[Coordinates, Metric]:
    """Return the coordinates for measured inputs, and the metric in them, without G where its row groups are uncoupled.

    Args:
        chain: a family.
        unit: u, in which the zero predictor has a loss of 1.
        metric: G ⊗ C with the second moment C of x around the centre.
        centre: as in `Coordinates`.
    """
    left, right = chain.patterns(1)[0], chain.patterns(1)[-1]
    columns, inputs = _whitened(metric.inputs.matrix, right.a)
    if metric.kind is LossMetric.OUTPUT_ENERGY:
        return Coordinates(unit, columns, None, centre), Metric(inputs)
    rows, grouped = _whitened(metric.rows_in_groups(left.d).matrix, left.d)
    is_coupled = grouped.coupling(left.d) is not None
    outputs = _in_natural_order(grouped.matrix, left.d) if is_coupled else None
    return Coordinates(unit, columns, rows, centre), Metric(inputs, outputs, damping=0.0)


def _whitened(moment: torch.Tensor, groups: int) -> tuple[Roots, SecondMoment]:
    """Return the roots of the groups of features, and the second moment of the whitened features."""
    root, inverse = root_and_inverse(_diagonal_blocks(moment, groups))
    whitened = _congruent(moment, inverse)
    for place, own in zip(_diagonal_blocks(whitened, groups), inverse @ root, strict=True):
        place.copy_(own)  # the identity, or a projection
    # Whitening has multiplied the rounding of the moment by its condition.
    if not is_semi_definite(whitened, FLOAT32_ROUNDING / 2):
        eigenvalues, vectors = torch.linalg.eigh(whitened)
        whitened = (vectors * eigenvalues.clamp(min=0)) @ vectors.mT
    return Roots(root, inverse), SecondMoment(whitened)


def _congruent(moment: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return ⊕B_i M ⊕B_iᵀ for M of shape (n, n) and B of shape (p, n/p, n/p), exactly symmetric."""
    product = _times_block_diagonal(_times_block_diagonal(moment, inverse.mT).mT, inverse.mT)
    return (product + product.mT) / 2


def _in_natural_order(moment: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the moment of rows that were ordered by their groups t::q, in the order of the rows of W."""
    order = torch.arange(len(moment)).view(groups, -1).t().flatten()
    return moment[order][:, order]


def _diagonal_blocks(matrix: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the view of shape (p, n/p, n/p) of the diagonal blocks of an n × n matrix."""
    return matrix.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _times_block_diagonal(matrix: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return A ⊕B_i for A of shape (m, n) and B of shape (p, n/p, n/p)."""
    columns = matrix.view(len(matrix), len(blocks), -1).transpose(0, 1)  # m (p k) -> p m k
    return (columns @ blocks.to(matrix.device)).transpose(0, 1).reshape(matrix.shape)


def whiten(samples: torch.Tensor) -> torch.Tensor:
    """Return X · chol(XᵀX / N)⁻ᵀ, whose second moment is I: its full-batch loss is the population loss.

    Args:
        samples: X, shape (N, n) with N ≥ n, any float dtype.
    Returns:
        tensor of the same shape and dtype. For N < 1.5n, XᵀX is too ill-conditioned for float32 and the work is done in
        float64; otherwise float32 leaves an error below 1e-6 in any entry of XᵀX / N.
    """
    count, features = samples.shape
    wide = samples.to(torch.float32 if 2 * count >= 3 * features else torch.float64)
    gram = lower_gram(wide.t())
    root = torch.empty_like(gram)
    whitened = torch.empty_like(samples, memory_format=torch.contiguous_format)

    def decompose(_) -> None:
        torch.linalg.cholesky(gram.div_(count), out=root)

    def solve(rows: slice) -> None:
        whitened[rows] = torch.linalg.solve_triangular(root.t(), wide[rows], upper=True, left=False)

    in_pieces(decompose, 1, samples.device)
    in_pieces(solve, count, samples.device)
    return whitened
