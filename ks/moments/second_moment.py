"""The second moment C = E[x xᵀ] of a layer's inputs: everything that a loss or a floor needs to know of them."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ks.errors import UsageError
from ks.moments.pieces import lower_gram, sum_of_squares

FLOAT32_ROUNDING = 1e-6  # relative; a moment summed in float32 is symmetric and positive semi-definite to about 1e-7
CHUNK_ROWS = 4096  # are promoted to float64 at a time
PANELS = 8  # the upper triangle in eight panels costs 9/16 of the full product: a float64 sum in the time of float32


class SecondMoment:
    """The second moment C of inputs x of n features: a measured matrix, which may be singular, or σ²I (`isotropic`).

    The root C^{1/2} comes from one symmetric eigendecomposition in float64, about 10 n³ operations, when it is first
    needed; negative eigenvalues within rounding count as zero.

    Args:
        matrix: C, shape (n, n), any float dtype, symmetric and positive semi-definite up to rounding.
    Raises:
        UsageError: another shape, entries that are not finite, not symmetric, or not positive semi-definite.
    """

    matrix: torch.Tensor  # C in float64; σ²I has no size, and so none
    _std: float | None = None  # σ of σ²I

    def __init__(self, matrix: torch.Tensor):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
            raise UsageError(
                f"second moment of shape {tuple(matrix.shape)} and {matrix.dtype}: a square float matrix is needed"
            )
        matrix = matrix.detach().double()
        if not matrix.isfinite().all():
            raise UsageError("the second moment holds NaN or infinite entries; collect it again")
        difference = (matrix - matrix.mT).abs().max().item()
        if difference > FLOAT32_ROUNDING * matrix.abs().max().item():
            raise UsageError(f"the second moment is not symmetric: entries differ by up to {difference:.3g} across it")
        self.matrix = (matrix + matrix.mT) / 2
        rounding = len(matrix) * torch.finfo(torch.float64).eps * self.matrix.diagonal().abs().max().item()
        if not is_semi_definite(self.matrix, rounding):
            eigenvalues, _ = self._spectrum
            if eigenvalues[0] < -FLOAT32_ROUNDING * eigenvalues[-1].clamp(min=0):
                raise UsageError(
                    f"the second moment is not positive semi-definite: its eigenvalues reach from {eigenvalues[0]:.3g} "
                    f"to {eigenvalues[-1]:.3g}"
                )
            # Without the negative part of a moment in float32, no loss is below a floor that comes from the root.
            self.matrix = self._root @ self._root

    @classmethod
    def isotropic(cls, std: float = 1.0) -> "SecondMoment":
        """Return C = σ²I, the second moment of x ~ N(0, σ²I), for any number of features.

        Args:
            std: σ, positive.
        """
        moment = cls.__new__(cls)
        moment._std = std
        return moment

    @classmethod
    def of(cls, moment: "torch.Tensor | SecondMoment | None") -> "SecondMoment":
        """Return a second moment that is given as a matrix C, as an object, or not at all, which means C = I."""
        if moment is None:
            return UNIT_MOMENT
        return cls(moment) if isinstance(moment, torch.Tensor) else moment

    @property
    def is_isotropic(self) -> bool:
        """Whether C is σ²I by construction."""
        return self._std is not None

    def matrix_of(self, features: int) -> torch.Tensor:
        """Return C, shape (n, n), float64, for n features, also where it is σ²I."""
        return self.matrix if self._std is None else self._std**2 * torch.eye(features, dtype=torch.float64)

    @cached_property
    def _spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues, ascending, and eigenvectors of C."""
        return torch.linalg.eigh(self.matrix)

    @cached_property
    def _root(self) -> torch.Tensor:
        eigenvalues, vectors = self._spectrum
        return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.mT

    def output_energy(self, weight: torch.Tensor, weighted: torch.Tensor | None = None) -> float:
        """Return tr(W C Wᵀ), the expected squared norm of W x, or tr(G W C Wᵀ).

        Args:
            weight: W, shape (m, n), any float dtype; multiplied and summed in float64.
            weighted: G W, float64; None for G = I.
        """
        if self._std is not None:
            rooted = self.times_root(weight)  # scaled before squaring, which would overflow earlier
            return sum_of_squares(rooted) if weighted is None else (rooted * self.times_root(weighted)).sum().item()
        wide = self._sized(weight)
        products = (wide @ self.matrix.to(wide.device)) * (wide if weighted is None else weighted)
        return products.sum().clamp(min=0).item()  # NaN stays NaN

    def times_root(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W C^{1/2} in float64: its squared singular values are the output energies of W's directions."""
        if self._std is not None:
            return weight.double() * self._std if self._std != 1.0 else weight.double()
        wide = self._sized(weight)
        return wide @ self._root.to(wide.device)

    def times_inverse_root(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W C^{-1/2} in float64; directions without energy count as zero."""
        if self._std is not None:
            return weight.double() / self._std
        wide = self._sized(weight)
        eigenvalues, vectors = (part.to(wide.device) for part in self._spectrum)
        kept = eigenvalues > len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues[-1]
        return (wide @ vectors * (torch.where(kept, eigenvalues, 1).rsqrt() * kept)) @ vectors.mT

    def output_moment(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the second moment W C Wᵀ of the outputs in float64, shape (m, m); only its lower triangle counts."""
        if self._std is not None:
            return lower_gram(self.times_root(weight).unsqueeze(0))[0]
        wide = self._sized(weight)
        return wide @ self.matrix.to(wide.device) @ wide.mT

    def check_features(self, count: int) -> None:
        """Raise UsageError unless C may be that of `count` features."""
        if not self.is_isotropic and len(self.matrix) != count:
            raise UsageError(f"second moment of {len(self.matrix)} features: a weight of {count} columns needs {count}")

    def _sized(self, weight: torch.Tensor) -> torch.Tensor:
        self.check_features(weight.shape[-1])
        return weight.double()

    def transform(self, unit_samples: torch.Tensor) -> torch.Tensor:
        """Return samples C^{1/2} z of second moment C for samples z of second moment I, in their dtype.

        Args:
            unit_samples: z, shape (N, n).
        """
        if self._std is not None:
            return unit_samples * self._std if self._std != 1.0 else unit_samples
        return unit_samples @ self._root.to(unit_samples)

    def coupling(self, groups: int) -> torch.Tensor | None:
        """Return C if it couples any two of `groups` equal groups of features, None if it is block diagonal."""
        if self._std is not None:
            return None
        width = len(self.matrix) // groups
        outside = self.matrix.clone()
        for start in range(0, len(outside), width):
            outside[start : start + width, start : start + width] = 0
        return self.matrix if outside.any() else None

    def largest_of_batch(self, batch: int, features: int) -> float:
        """Return about the largest eigenvalue of Xᵀ X / B over batches X of B Gaussian samples: (√λ + √(tr C / B))²
        with λ the largest eigenvalue of C.

        Source: Koltchinskii, Lounici, "Concentration inequalities and moment bounds for sample covariance operators"
        (2017); for C = I it is (1 + √(n / B))².

        Args:
            batch: B.
            features: n.
        """
        if self._std is not None:
            return self._std**2 * (1 + (features / batch) ** 0.5) ** 2
        largest = self._spectrum[0][-1].item()
        return (largest**0.5 + (self.matrix.trace().item() / batch) ** 0.5) ** 2

    @property
    def effective_rank(self) -> float:
        """(tr C)² / ‖C‖_F², between 1 and n: the number of equal directions with as much spread; 0 for C = 0."""
        squares = self.matrix.square().sum().item()
        return self.matrix.trace().item() ** 2 / squares if squares else 0.0


UNIT_MOMENT = SecondMoment.isotropic()


def is_semi_definite(matrix: torch.Tensor, tolerance: float) -> bool:
    """Return whether no eigenvalue is below −tolerance; a Cholesky factorisation takes a tenth of the eigenvalues'.

    Args:
        matrix: symmetric, shape (n, n), float64.
        tolerance: positive.
    """
    shifted = matrix.clone()
    shifted.diagonal().add_(tolerance)
    return torch.linalg.cholesky_ex(shifted).info.item() == 0


@dataclass
class VectorSums:
    """Sums over N vectors x of width n: the inputs of a layer, or the gradients at its outputs.

    Args:
        sum_xx: Σ x xᵀ, shape (n, n), float64. While rows are added, only its upper triangle is maintained.
        sum_x: Σ x, shape (n,), float64.
        count: N.
    """

    sum_xx: torch.Tensor
    sum_x: torch.Tensor
    count: int

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> "VectorSums":
        """Return the sums over no vectors of n features."""
        square = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(square, torch.zeros(width, dtype=torch.float64, device=device), 0)

    @classmethod
    def of(cls, rows: torch.Tensor) -> "VectorSums":
        """Return the sums over vectors of shape (N, n), any float dtype, on the CPU."""
        sums = cls.zeros(rows.shape[1], rows.device)
        sums.add(rows)
        return sums.finished()

    @property
    def width(self) -> int:
        """n."""
        return len(self.sum_x)

    @property
    def second_moment(self) -> torch.Tensor:
        """C = Σ x xᵀ / N, shape (n, n), float64."""
        return self.sum_xx / self.count

    @property
    def mean(self) -> torch.Tensor:
        """Σ x / N, shape (n,), float64."""
        return self.sum_x / self.count

    def add(self, rows: torch.Tensor, dtype: torch.dtype = torch.float64) -> None:
        """Add vectors to the sums.

        Args:
            rows: shape (N, n), any float dtype, on any device.
            dtype: of the products of up to 4096 rows; they are summed in float64.
        """
        step = -(-self.width // PANELS)
        for chunk in rows.split(CHUNK_ROWS):
            chunk = chunk.to(self.sum_x.device, dtype)
            self.sum_x += chunk.sum(0, dtype=torch.float64)
            for start in range(0, self.width, step):
                panel, rest = chunk[:, start : start + step].t(), chunk[:, start:]
                sums = self.sum_xx[start : start + step, start:]
                if dtype == torch.float64:
                    sums.addmm_(panel, rest)
                else:
                    sums += chunk.new_zeros(sums.shape).addmm_(panel, rest)  # in place, because autocast would round it
        self.count += len(rows)

    def finished(self) -> "VectorSums":
        """Return the sums on the CPU, with an exactly symmetric Σ x xᵀ."""
        square = self.sum_xx.cpu()
        return VectorSums(square.triu() + square.triu(1).t(), self.sum_x.cpu(), self.count)

    def plus(self, other: "VectorSums") -> "VectorSums":
        """Return the sums over the vectors of both."""
        return VectorSums(self.sum_xx + other.sum_xx, self.sum_x + other.sum_x, self.count + other.count)
