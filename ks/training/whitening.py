"""Whitening: of a set of samples, and of the coordinates in which a chain learns.

In these coordinates the zero predictor has a loss of 1 and every column group of x is white. Neither losses nor floors
nor the shape of a chain depend on them: with C_ii = G_i G_iᵀ the second moment of column
group i of the right-most factor, y' = y / u and x'_i = G_i⁺ (x_i − μ_i) turn W into W ⊕G_i / u and that factor into
K_L ⊕G_i, up to u. Optimizers need far fewer steps there: inputs of real layers have conditions up to 1e9.
"""

import copy
from dataclasses import dataclass

import torch

from ks.bounds.descent import root_and_inverse
from ks.chain.patterns import Chain
from ks.files.atomic import save_tensors
from ks.layer import KSLinear
from ks.moments.pieces import in_pieces, lower_gram, sum_of_squares
from ks.moments.second_moment import FLOAT32_ROUNDING, SecondMoment, is_semi_definite

# Values of a chain are saved in float64 where float32 would lose more than about 1e-7 of the loss: the whitening of a
# column group multiplies rounding by its condition.
LARGEST_FLOAT32_CONDITION = 1e4


@dataclass(frozen=True)
class Coordinates:
    """The change of coordinates for one weight, chain family and second moment.

    Args:
        unit: of the weight: W' = W ⊕G_i / unit.
        root, inverse: G_i and G_i⁺, shape (p, n/p, n/p), float64; None where they are the identity.
        centre: μ, shape (n,), float64; None for 0.
    """

    unit: float
    root: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    centre: torch.Tensor | None = None

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W ⊕G_i / unit.

        Args:
            weight: W, shape (m, n), float64; overwritten.
        """
        if self.root is not None:
            weight = _times_block_diagonal(weight, self.root)
        return weight.div_(self.unit)

    def samples(self, samples: torch.Tensor) -> torch.Tensor:
        """Return samples x' of centred samples x, shape (N, n), float64."""
        return samples if self.inverse is None else _times_block_diagonal(samples, self.inverse.mT)

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
        condition = 1.0
        if self.root is not None and self.inverse is not None:
            right = outside.factors[-1]
            folded = right.squeeze(-1) @ self.inverse.to(right.device)  # p (r q) (n/p)
            norms = [torch.linalg.matrix_norm(matrices, 2) for matrices in (self.root, self.inverse)]
            condition = (norms[0] * norms[1]).max().item()
            right.copy_(folded.unsqueeze(-1))
        scale = self.unit ** (1 / len(outside.factors))
        for factor in outside.factors:
            factor.mul_(scale)
        precise = condition > LARGEST_FLOAT32_CONDITION or not 1e-25 < self.unit < 1e25
        return outside if precise else outside.to(dtype)


def isotropic_coordinates(weight: torch.Tensor) -> Coordinates:
    """Return the coordinates for isotropic inputs and a weight of shape (m, n); the second moment of x' is I."""
    return Coordinates((sum_of_squares(weight) / len(weight)) ** 0.5)


def measured_coordinates(
    chain: Chain, predict_zero_loss: float, moment: torch.Tensor, centre: torch.Tensor | None
) -> tuple[Coordinates, SecondMoment]:
    """Return the coordinates for measured inputs, and the second moment of x'.

    Args:
        chain: a family.
        predict_zero_loss: mean square of an output.
        moment: second moment of x around the centre, shape (n, n), float64.
        centre: as in `Coordinates`.
    """
    groups = chain.patterns(1)[-1].a
    root, inverse = root_and_inverse(_diagonal_blocks(moment, groups))
    coordinates = Coordinates(predict_zero_loss**0.5, root, inverse, centre)
    whitened = _times_block_diagonal(_times_block_diagonal(moment, inverse.mT).mT, inverse.mT)
    whitened = (whitened + whitened.mT) / 2
    for place, own in zip(_diagonal_blocks(whitened, groups), inverse @ root, strict=True):
        place.copy_(own)  # the identity, or a projection
    # Whitening has multiplied the rounding of C by its condition.
    if not is_semi_definite(whitened, FLOAT32_ROUNDING / 2):
        eigenvalues, vectors = torch.linalg.eigh(whitened)
        whitened = (vectors * eigenvalues.clamp(min=0)) @ vectors.mT
    return coordinates, SecondMoment(whitened)


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
