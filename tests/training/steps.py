"""A small weight, its samples, steps and epochs: shared by the tests of the training."""

import torch

from ks.cli.flags import TrainerConfig
from ks.training.samples import Samples
from ks.training.schedule import Schedule

WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))


def make_samples(weight=WEIGHT, **changes):
    arguments = {"num_train": 43, "num_validation": 9, "batch_size": 8, "sampling": "whitened", "seed": 0} | changes
    return Samples(weight, **arguments)


def schedule_of(name, steps_per_epoch=1, num_epochs=20, **flags):
    return Schedule(TrainerConfig(scheduler=name, num_epochs=num_epochs, **flags), steps_per_epoch)


def update(optimizer, loss, lr):
    """Backward pass by autograd, then the optimizer's update."""
    gradients = torch.autograd.grad(loss * optimizer.scale(lr), optimizer.parameters)
    with torch.no_grad():
        for place, gradient in zip(optimizer.gradients, gradients):
            place.copy_(gradient)
        return optimizer.update(lr, loss.detach())


def run_epoch(step, samples, number, lr, prepare=lambda number: None):
    """Take the steps of an epoch at one rate or at a rate for each; return losses and norms, shape (2, steps)."""
    rates = lr if isinstance(lr, list) else [lr] * samples.steps_per_epoch
    taken = []
    for (index, x, y), rate in zip(samples.epoch(number), rates, strict=True):
        prepare(index)
        taken.append(torch.stack(step(x, y, rate)))
    return torch.stack(taken, 1)
