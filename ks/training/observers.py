"""What happens at the end of every epoch besides training: curves on disk, lines on the terminal."""

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from ks.cli.console import note
from ks.cli.flags import TrainerConfig
from ks.files.curves import write_curves
from ks.files.layout import RunFiles


@dataclass(frozen=True)
class EpochEnd:
    """One finished epoch.

    curves: rows of all epochs so far, the last one of this epoch. losses, grad_norms: of its steps, shape (steps,).
    """

    curves: list[dict]
    losses: torch.Tensor
    grad_norms: torch.Tensor


class Observer(Protocol):
    """Told about every epoch and the end, in one place of the training loop."""

    def epoch_ended(self, end: EpochEnd) -> None: ...

    def training_ended(self, curves: list[dict]) -> None: ...


class CurvesOnDisk:
    """Writes the curves after every epoch, or less often where writing would take more than 5% of the time."""

    def __init__(self, files: RunFiles):
        self.files, self._next_write = files, 0.0

    def epoch_ended(self, end: EpochEnd) -> None:
        started = time.monotonic()
        if started >= self._next_write:
            write_curves(self.files, end.curves)
            self._next_write = started + 20 * (time.monotonic() - started)

    def training_ended(self, curves: list[dict]) -> None:
        write_curves(self.files, curves)


class ConsoleReport:
    """Prints a line for every epoch on stderr; with --verbose, also lines within the epoch."""

    def __init__(self, config: TrainerConfig):
        self.config = config

    def epoch_ended(self, end: EpochEnd) -> None:
        config, row = self.config, end.curves[-1]
        if config.quiet:
            return
        if config.verbose:
            for step in range(config.log_interval - 1, len(end.losses), config.log_interval):
                norm = f", gradient norm {end.grad_norms[step]:.4g}" if config.log_grad_norm else ""
                note(f"  step {step + 1}/{len(end.losses)}: loss {end.losses[step]:.6g}{norm}")
        norm = f", gradient norm {row['grad_norm']:.4g}" if "grad_norm" in row else ""
        note(
            f"epoch {row['epoch']}/{config.num_epochs}: train {row['train_loss']:.6g}, "
            f"validation {row['val_loss']:.6g}{norm}, {row['epoch_seconds']:.2f} s"
        )

    def training_ended(self, curves: list[dict]) -> None:
        """The record of the run says how it ended."""
