"""Streaming sums over the inputs of a layer, in float64: Σ x xᵀ, Σ x and the number of inputs."""

from dataclasses import dataclass

import torch

CHUNK_ROWS = 4096  # are promoted to float64 at a time
PANELS = 8  # the upper triangle in eight panels costs 9/16 of the full product: a float64 sum in the time of float32


@dataclass
class InputSums:
    """Sums over N inputs x of width n.

    Args:
        sum_xx: Σ x xᵀ, shape (n, n), float64. While rows are added, only its upper triangle is maintained.
        sum_x: Σ x, shape (n,), float64.
        count: N.
    """

    sum_xx: torch.Tensor
    sum_x: torch.Tensor
    count: int

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> "InputSums":
        """Return the sums over no inputs.

        Args:
            width: n.
            device: of the sums.
        """
        square = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(square, torch.zeros(width, dtype=torch.float64, device=device), 0)

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

    def add(self, rows: torch.Tensor) -> None:
        """Add inputs to the sums.

        Args:
            rows: shape (N, n), any float dtype, on any device; promoted to float64 before they are multiplied.
        """
        step = -(-self.width // PANELS)
        for chunk in rows.split(CHUNK_ROWS):
            chunk = chunk.to(self.sum_x.device).double()
            self.sum_x += chunk.sum(0)
            for start in range(0, self.width, step):
                panel = chunk[:, start : start + step]
                self.sum_xx[start : start + step, start:].addmm_(panel.t(), chunk[:, start:])
        self.count += len(rows)

    def finished(self) -> "InputSums":
        """Return the sums on the CPU, with an exactly symmetric Σ x xᵀ."""
        square = self.sum_xx.cpu()
        return InputSums(square.triu() + square.triu(1).t(), self.sum_x.cpu(), self.count)

    def plus(self, other: "InputSums") -> "InputSums":
        """Return the sums over the inputs of both."""
        return InputSums(self.sum_xx + other.sum_xx, self.sum_x + other.sum_x, self.count + other.count)
