"""The learning rate of every step."""

import math


class Schedule:
    """Learning rate per step.

    cosine: lr · (1 + cos(π t / T)) / 2 over the T steps of the run; plateau: times `factor` after more than `patience`
    epochs without a validation loss 1e-4 (relative) below the best; step: times `gamma` every `step_size` epochs;
    none: lr.
    """

    def __init__(self, name, lr, steps_per_epoch, num_epochs, *, patience=10, factor=0.5, step_size=30, gamma=0.1):
        self.name, self.lr, self.steps_per_epoch, self.num_epochs = name, lr, steps_per_epoch, num_epochs
        self.patience, self.factor, self.step_size, self.gamma = patience, factor, step_size, gamma
        self.best, self.bad_epochs, self.reduction = math.inf, 0, 1.0

    def rate(self, epoch: int, step: int) -> float:
        """Return the learning rate of step `step` (from 0) of epoch `epoch` (from 1)."""
        if self.name == "cosine":
            progress = (epoch - 1 + step / self.steps_per_epoch) / self.num_epochs
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        if self.name == "step":
            return self.lr * self.gamma ** ((epoch - 1) // self.step_size)
        return self.lr * self.reduction

    def state(self) -> tuple:
        """Return everything that changes, for a checkpoint."""
        return self.best, self.bad_epochs, self.reduction

    def restore(self, state: tuple) -> None:
        """Put a state back."""
        self.best, self.bad_epochs, self.reduction = state

    def end_epoch(self, validation_loss: float) -> None:
        """Update the plateau schedule with the validation loss of an epoch."""
        if self.name != "plateau":
            return
        if validation_loss < self.best * (1 - 1e-4):
            self.best, self.bad_epochs = validation_loss, 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > self.patience:
            self.reduction, self.bad_epochs = self.reduction * self.factor, 0
