"""The learning rate of every step."""

import math

from ks.cli.flags import OptimizerFlags


class Schedule:
    """Learning rate per step, relative: every optimizer multiplies it by its `rate_factors`, 100/√c for AdamW.

    cosine: lr · (1 + cos(π t / T)) / 2 over the T steps of the run; plateau: times `scheduler_factor` after more than
    `scheduler_patience` epochs without a validation loss 1e-4 (relative) below the best; step: times `gamma` every
    `step_size` epochs; none: lr.
    """

    def __init__(self, config: OptimizerFlags, steps_per_epoch: int):
        self.config, self.steps_per_epoch = config, steps_per_epoch
        self.best, self.bad_epochs, self.reduction = math.inf, 0, 1.0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over all epochs."""
        config = self.config
        if config.scheduler == "cosine":
            progress = step / (self.steps_per_epoch * config.num_epochs)
            return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
        if config.scheduler == "step":
            return config.lr * config.gamma ** (step // self.steps_per_epoch // config.step_size)
        return config.lr * self.reduction

    def state(self) -> tuple:
        """Return everything that changes, for a checkpoint."""
        return self.best, self.bad_epochs, self.reduction

    def restore(self, state: tuple) -> None:
        """Put a state back."""
        self.best, self.bad_epochs, self.reduction = state

    def end_epoch(self, validation_loss: float) -> None:
        """Update the plateau schedule with the validation loss of an epoch."""
        if self.config.scheduler != "plateau":
            return
        if validation_loss < self.best * (1 - 1e-4):
            self.best, self.bad_epochs = validation_loss, 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > self.config.scheduler_patience:
            self.reduction, self.bad_epochs = self.reduction * self.config.scheduler_factor, 0
