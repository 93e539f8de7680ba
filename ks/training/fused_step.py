"""A training step on the mean squared error whose parts besides the products are five Triton kernels.

It stands for the step of `train_with_random.py` inside a captured CUDA graph, and nobody has measured it on a GPU yet.
"""

import math

import torch

from ks.product.passes import ChainPasses
from ks.training.cuda_graph import Cursor
from ks.training.gauss_newton import LOSS_MEMORY
from ks.training.optimiser import ADAM_BETAS, ADAM_EPSILON, SGD_MOMENTUM, LossScale, Optimiser
from ks.training.samples import Samples


class FusedStep:
    """Forward pass, loss, backward pass and update, without a host read.

    Args:
        passes: of the training batches.
        optimiser: its parameters, moments and counters are updated in place.
        samples: the batches; the dtype of their inputs is that of the products.
    """

    def __init__(self, passes: ChainPasses, optimiser: Optimiser, samples: Samples):
        from triton.errors import TritonError

        from ks.training import step_kernels

        self.errors: tuple[type[Exception], ...] = (TritonError,)
        self._kernels = step_kernels
        self.passes, self.optimiser, self.samples = passes, optimiser, samples
        device, dtype = samples.inputs.device, samples.inputs.dtype
        self._half = dtype != torch.float32
        self._values = [values.to(dtype) for values in optimiser.parameters]  # themselves, in float32
        self._inputs = torch.empty_like(samples.inputs[0])
        self._gradient = torch.empty_like(samples.targets[0], dtype=dtype)
        self._sums = torch.zeros(2, step_kernels.PARTS, device=device)
        self._numbers = torch.zeros(5, device=device)
        self._scale = optimiser.loss_scale or LossScale(device)
        if optimiser.loss_scale is None:
            self._scale.scale.fill_(1.0)
        self._relative_loss = getattr(optimiser, "relative_loss", torch.zeros((), device=device))

    def start_epoch(self) -> None:
        """Copy the parameters, which a checkpoint may have replaced, into those of the products."""
        if self._half:
            torch._foreach_copy_(self._values, self.optimiser.parameters)

    def __call__(self, cursor: Cursor) -> None:
        """Take the step at the position of `cursor`, and advance it."""
        kernels, optimiser = self._kernels, self.optimiser
        place = (cursor.order, cursor.position)
        kernels.take_batch(self.samples.inputs, *place, self._inputs)
        prediction, *inner = self.passes.forward(self._inputs, self._values)
        kernels.loss(prediction, self.samples.targets, *place, self._scale.scale, self._gradient, self._sums[0])
        self.passes.backward(
            self._gradient,
            self._inputs,
            self._values,
            inner,
            out=optimiser.gradients,
            scaling=optimiser.scaling,
            direct=True,
        )
        kernels.norm(optimiser.gradient, self._sums[1])
        kernels.finish(
            self._sums,
            cursor,
            self._scale,
            optimiser.count,
            self._relative_loss,
            self._numbers,
            outputs=self._gradient.numel(),
            max_norm=optimiser.max_grad_norm or math.inf,
            loss_memory=LOSS_MEMORY,
            scaled=optimiser.loss_scale is not None,
            betas=ADAM_BETAS,
        )
        adam = optimiser.name != "sgd"
        decay = {"decay": optimiser.weight_decay} if optimiser.decoupled else {"l2": optimiser.weight_decay}
        memories = {"memories": ADAM_BETAS if adam else (SGD_MOMENTUM, 0.0), "epsilon": ADAM_EPSILON}
        copies = self._values if self._half else None
        kernels.update(
            optimiser.parameters,
            optimiser.gradients,
            optimiser.moments,
            copies,
            optimiser.rate_factors,
            self._numbers,
            **decay,
            **memories,
        )
