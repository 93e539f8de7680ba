"""A small weight, its samples and an update from a loss: shared by the tests of the training."""

import torch

from ks.training.samples import Samples

WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))


def make_samples(weight=WEIGHT, **changes):
    arguments = {"num_train": 43, "num_validation": 9, "batch_size": 8, "sampling": "whitened", "seed": 0} | changes
    return Samples(weight, **arguments)


def update(optimiser, loss, lr):
    """Backward pass by autograd, then the optimiser's update."""
    gradients = torch.autograd.grad(loss * optimiser.scale, optimiser.parameters)
    with torch.no_grad():
        for place, gradient in zip(optimiser.gradients, gradients):
            place.copy_(gradient)
        return optimiser.update(lr, loss.detach())
