"""Epochs of training steps, one after another; the CPU threads that are worth using for them."""

from collections.abc import Callable

import torch

from ks import signals
from ks.training.samples import Samples

Prepare = Callable[[int], None]
Step = Callable[[torch.Tensor, torch.Tensor, float | torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Epochs:
    """The steps of an epoch, one after another.

    Args:
        step: (inputs, targets, lr) → (loss, gradient norm), scalars on the device.
        samples: the batches.
        prepare: called before each step with its number, from 0 over all epochs.
    """

    def __init__(self, step: Step, samples: Samples, prepare: Prepare | None = None):
        self.step, self.samples = step, samples
        self.prepare = prepare or (lambda number: None)

    def run(self, number: int, rates: list[float]) -> torch.Tensor:
        """Take the steps of epoch `number` (from 1) at these learning rates.

        Returns:
            losses and gradient norms before clipping, shape (2, steps), on the device.
        Raises:
            KeyboardInterrupt: between two steps.
        """
        order = self.samples.start_epoch(number).tolist()
        inputs, targets = self.samples.inputs, self.samples.targets
        results = []
        for index, (batch, rate) in enumerate(zip(order, rates, strict=True), (number - 1) * len(order)):
            signals.check()
            self.prepare(index)
            results.append(self.step(inputs[batch], targets[batch], rate))
        return torch.stack([torch.stack(column) for column in zip(*results)])


def useful_threads(multiply_adds: int) -> int:
    """Return the number of CPU threads worth using for a forward pass of this many multiply-adds.

    Below 2^25 multiply-adds a thread, waking another thread costs more than it helps (measured at 1024 × 2048: no gain
    at rank 64 and batch 32, a factor of 1.6 at batch 256).
    """
    return max(1, min(torch.get_num_threads(), multiply_adds // 2**25))
