"""The second moment C = E[x xᵀ] of a layer's inputs: everything that a loss or a floor needs to know of them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from ks.errors import UsageError
from ks.moments.gram import is_semi_definite, lower_gram
from ks.moments.pieces import sum_of_squares

ROUNDING = 1e-6  # relative; a moment that was summed in float32 is symmetric and positive semi-definite to about 1e-7


class Inputs(Protocol):
    """The second moment C of the inputs x of a layer, of n features."""

    def output_energy(self, weight: torch.Tensor) -> float:
        """Return tr(W C Wᵀ), the expected squared norm of W x, for W of shape (m, n) and any float dtype."""

    def times_root(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W F in float64, with C = F Fᵀ and F symmetric; F is block diagonal where C is."""

    def output_moment(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the second moment W C Wᵀ of the outputs in float64; only its lower triangle counts."""

    def colour(self, unit_samples: torch.Tensor) -> torch.Tensor:
        """Return samples z Fᵀ of second moment C for samples z of second moment I, shape (N, n)."""

    def coupling(self, groups: int) -> torch.Tensor | None:
        """Return C if it couples any two of `groups` equal groups of features, None if it is block diagonal."""

    def largest_of_batch(self, batch: int, features: int) -> float:
        """Return about the largest eigenvalue of Xᵀ X / B over batches X of B Gaussian samples: (√λ + √(tr C / B))²
        with λ the largest eigenvalue of C.

        Source: Koltchinskii, Lounici, "Concentration inequalities and moment bounds for sample covariance operators"
        (2017); for C = I it is (1 + √(n / B))².

        Args:
            batch: B.
            features: n.
        """


@dataclass(frozen=True)
class IsotropicInputs:
    """Inputs x ~ N(0, σ²I), of second moment C = σ²I.

    Args:
        std: σ, positive.
    """

    std: float = 1.0

    def output_energy(self, weight: torch.Tensor) -> float:
        """Return tr(W C Wᵀ) = σ²‖W‖_F², the expected squared norm of W x.

        Args:
            weight: shape (m, n), any float dtype; summed in float64.
        """
        return sum_of_squares(self.times_root(weight))  # scaled before squaring, which would overflow earlier

    def times_root(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W C^{1/2} = σW in float64: its squared singular values are the output energies of W's directions."""
        return weight.double() * self.std if self.std != 1.0 else weight.double()

    def output_moment(self, weight: torch.Tensor) -> torch.Tensor:
        """Return σ² W Wᵀ in float64, shape (m, m); only its lower triangle counts."""
        return lower_gram(self.times_root(weight).unsqueeze(0))[0]

    def colour(self, unit_samples: torch.Tensor) -> torch.Tensor:
        """Return C^{1/2} z = σz for samples z of second moment I.

        Args:
            unit_samples: shape (N, n).
        """
        return unit_samples * self.std if self.std != 1.0 else unit_samples

    def coupling(self, groups: int) -> torch.Tensor | None:
        """Return None: σ²I couples no features."""
        return None

    def largest_of_batch(self, batch: int, features: int) -> float:
        """Return σ² (1 + √(n / B))²."""
        return self.std**2 * (1 + (features / batch) ** 0.5) ** 2


UNIT_INPUTS = IsotropicInputs()


class MeasuredInputs:
    """Inputs with a measured second moment C, which may be singular.

    The root C^{1/2} comes from one symmetric eigendecomposition in float64, about 10 n³ operations, when it is first
    needed; negative eigenvalues within rounding count as zero.

    Args:
        moment: C, shape (n, n), any float dtype, symmetric and positive semi-definite up to rounding.
    Raises:
        UsageError: another shape, entries that are not finite, not symmetric, or not positive semi-definite.
    """

    def __init__(self, moment: torch.Tensor):
        if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or not moment.is_floating_point():
            raise UsageError(
                f"second moment of shape {tuple(moment.shape)} and {moment.dtype}: a square float matrix is needed"
            )
        moment = moment.detach().double()
        if not moment.isfinite().all():
            raise UsageError("the second moment holds NaN or infinite entries; collect it again")
        difference = (moment - moment.mT).abs().max().item()
        if difference > ROUNDING * moment.abs().max().item():
            raise UsageError(f"the second moment is not symmetric: entries differ by up to {difference:.3g} across it")
        self._moment = (moment + moment.mT) / 2
        rounding = len(moment) * torch.finfo(torch.float64).eps * self._moment.diagonal().abs().max().item()
        if not is_semi_definite(self._moment, rounding):
            eigenvalues, _ = self._spectrum
            if eigenvalues[0] < -ROUNDING * eigenvalues[-1].clamp(min=0):
                raise UsageError(
                    f"the second moment is not positive semi-definite: its eigenvalues reach from {eigenvalues[0]:.3g} "
                    f"to {eigenvalues[-1]:.3g}"
                )
            # Without the negative part of a moment in float32, no loss is below a floor that comes from the root.
            self._moment = self._root @ self._root

    @cached_property
    def _spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues, ascending, and eigenvectors of C."""
        return torch.linalg.eigh(self._moment)

    @cached_property
    def _root(self) -> torch.Tensor:
        eigenvalues, vectors = self._spectrum
        return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.mT

    def output_energy(self, weight: torch.Tensor) -> float:
        """Return tr(W C Wᵀ), the expected squared norm of W x.

        Args:
            weight: shape (m, n), any float dtype; multiplied and summed in float64.
        """
        wide = self._sized(weight)
        return ((wide @ self._moment.to(wide.device)) * wide).sum().clamp(min=0).item()  # NaN stays NaN

    def times_root(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W C^{1/2} in float64: its squared singular values are the output energies of W's directions."""
        wide = self._sized(weight)
        return wide @ self._root.to(wide.device)

    def output_moment(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W C Wᵀ in float64, shape (m, m); only its lower triangle counts."""
        wide = self._sized(weight)
        return wide @ self._moment.to(wide.device) @ wide.mT

    def _sized(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.shape[-1] != len(self._moment):
            raise UsageError(
                f"second moment of {len(self._moment)} features: a weight of shape {tuple(weight.shape)} needs "
                f"{weight.shape[-1]}"
            )
        return weight.double()

    def colour(self, unit_samples: torch.Tensor) -> torch.Tensor:
        """Return C^{1/2} z for samples z of second moment I, in their dtype.

        Args:
            unit_samples: shape (N, n).
        """
        return unit_samples @ self._root.to(unit_samples)

    def second_moment(self) -> torch.Tensor:
        """Return C, shape (n, n), float64."""
        return self._moment

    def coupling(self, groups: int) -> torch.Tensor | None:
        """Return C if it couples any two of `groups` equal groups of features, None if it is block diagonal."""
        width = len(self._moment) // groups
        outside = self._moment.clone()
        for start in range(0, len(outside), width):
            outside[start : start + width, start : start + width] = 0
        return self._moment if outside.any() else None

    def largest_of_batch(self, batch: int, features: int) -> float:
        """Return (√λ + √(tr C / B))²."""
        largest = self._spectrum[0][-1].item()
        return (largest**0.5 + (self._moment.trace().item() / batch) ** 0.5) ** 2

    @property
    def effective_rank(self) -> float:
        """(tr C)² / ‖C‖_F², between 1 and n: the number of equal directions with as much spread; 0 for C = 0."""
        squares = self._moment.square().sum().item()
        return self._moment.trace().item() ** 2 / squares if squares else 0.0

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue; infinite if C is singular to rounding."""
        eigenvalues, _ = self._spectrum
        smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
        singular = smallest <= len(eigenvalues) * torch.finfo(torch.float64).eps * largest
        return float("inf") if singular else largest / smallest
