"""The second moment C = E[x xᵀ] of a layer's inputs: everything that a loss or a floor needs to know of them."""

from dataclasses import dataclass

import torch

from ks.product.pieces import sum_of_squares


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

    def colour(self, unit_samples: torch.Tensor) -> torch.Tensor:
        """Return C^{1/2} z = σz for samples z of second moment I.

        Args:
            unit_samples: shape (N, n).
        """
        return unit_samples * self.std if self.std != 1.0 else unit_samples


UNIT_INPUTS = IsotropicInputs()
