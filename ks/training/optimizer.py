"""One optimizer step: AdamW, Adam or SGD, clipped, with loss scaling for float16, without a host read.

The updates are the fused kernels under `torch.optim`: building a `torch.optim.Optimizer` imports dynamo, which would
double the start-up of every run.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from ks.chain.split_grams import SplitMatrices

# A value of a factor has the natural size 1/√c (it keeps the variance of its input). One Adam step of learning rate lr
# moves it by RELATIVE_STEP · lr of that, whatever rank, shape and scale. Of what was tried, this and the second-moment
# memory of 20 steps come closest to the floor at lr = 1e-3 (benchmarks/README.md).
RELATIVE_STEP = 100.0
ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-8
SGD_MOMENTUM = 0.9


class LossScale:
    """Dynamic loss scaling for float16: halved when a gradient overflows (that step is skipped), doubled after 500 good
    steps."""

    def __init__(self, device):
        self.scale = torch.full((), 2.0**16, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf = torch.zeros((), device=device)

    def unscale(self, gradient: torch.Tensor) -> torch.Tensor:
        """Divide a gradient by the scale in place; return 1.0 if any of it was not finite, else 0.0."""
        self.found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], self.found_inf, self.scale.reciprocal())
        torch._amp_update_scale_(self.scale, self.growth, self.found_inf, 2.0, 0.5, 500)
        return self.found_inf


class Optimizer:
    """AdamW, Adam or SGD with momentum: fused, clipped, loss-scaled for float16, without a host read.

    Adam's rate is relative to the natural size of each factor's values (`RELATIVE_STEP`), SGD's is the plain one.

    Args:
        name: 'adamw', 'adam' or 'sgd'.
        parameters: values of shape (a, b, c, d), float32, each without gaps in memory; updated in place.
        weight_decay: AdamW's decay per unit of lr; for the others the factor of the L2 term.
        max_grad_norm: the global gradient norm is clipped to this; 0 switches it off.
        loss_scaling: for float16.
        measure_norm: whether `update` returns the gradient norm even if nothing is clipped; that reads all gradients.

    A step multiplies its loss gradient by `scale(lr)`, and writes the gradients of the parameters into `places`, laid
    out as they are, before it calls `update`; if `scaling` is set, with every gradient multiplied by these matrices; if
    `accumulates`, it adds them. `prepare` comes before the step and `end_epoch` after all steps of an epoch; a captured
    step contains neither, and belongs to one `phase`.
    """

    scaling: SplitMatrices | None = None
    accumulates = False
    phase = 0

    def __init__(
        self, name, parameters, *, weight_decay=0.0, max_grad_norm=1.0, loss_scaling=False, measure_norm=False
    ):
        self.name, self.parameters = name, list(parameters)
        self.max_grad_norm, self.weight_decay = max_grad_norm, weight_decay
        self.measure_norm = measure_norm or bool(max_grad_norm)
        device = self.parameters[0].device
        self.loss_scale = LossScale(device) if loss_scaling else None
        # One buffer, so that norm and scaling are one operation.
        self.gradient = torch.zeros(sum(values.numel() for values in self.parameters), device=device)
        parts = self.gradient.split([values.numel() for values in self.parameters])
        self.gradients = [part.as_strided(v.shape, v.stride()) for part, v in zip(parts, self.parameters)]
        self.places: list[torch.Tensor | None] = [*self.gradients]
        self.count, self._no_norm = torch.zeros((), device=device), torch.full((), math.nan, device=device)
        if name == "sgd":
            self.rate_factors = [1.0] * len(self.parameters)
            self.moments = [[torch.zeros_like(values)] for values in self.parameters]
            self._fused: Callable[..., None] = torch._fused_sgd_
            self._settings: dict[str, Any] = {
                "momentum": SGD_MOMENTUM,
                "dampening": 0.0,
                "nesterov": False,
                "is_first_step": False,
            }
        else:
            self.rate_factors = [RELATIVE_STEP * values.shape[2] ** -0.5 for values in self.parameters]
            self.moments = [[torch.zeros_like(values), torch.zeros_like(values)] for values in self.parameters]
            self._fused = torch._fused_adamw_ if name == "adamw" else torch._fused_adam_
            self._settings = {"beta1": ADAM_BETAS[0], "beta2": ADAM_BETAS[1], "eps": ADAM_EPSILON, "amsgrad": False}

    @functools.cached_property
    def _groups(self) -> list[tuple[float, list[list[torch.Tensor]]]]:
        """Return every rate factor with the values, gradients and moments that it moves: one fused call each."""
        groups: dict[float, list] = {}
        for factor, *tensors in zip(self.rate_factors, self.parameters, self.gradients, self.moments, strict=True):
            groups.setdefault(factor, []).append([*tensors[:2], *tensors[2]])
        return [(factor, [list(kind) for kind in zip(*members)]) for factor, members in groups.items()]

    def scale(self, lr: float | torch.Tensor) -> float | torch.Tensor:
        """Return the number by which a step multiplies its loss gradient: the loss scale, or 1."""
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def state(self) -> list[torch.Tensor]:
        """Return every tensor that a step changes and the next one reads."""
        scaling = vars(self.loss_scale).values() if self.loss_scale else ()
        return [*self.parameters, *itertools.chain(*self.moments), self.count, *scaling]

    def prepare(self, step: int) -> None:
        """Do what is due before step `step`, counted from 0 over the whole run."""

    @property
    def destination(self) -> dict[str, Any]:
        """Where a step writes its gradients, and how: arguments of `ks.chain.passes.ChainPasses.backward`."""
        return {"out": self.places, "accumulate": self.accumulates, "scaling": self.scaling}

    def end_epoch(self) -> None:
        """Do what is due after the steps of an epoch, before the parameters are read."""

    def trouble(self) -> str | None:
        """Return a warning about the steps so far, each once; read at the end of an epoch."""
        return None

    def update(self, lr: float | torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Update the parameters from `gradients`.

        Args:
            lr: learning rate of this step; a scalar tensor on the device can change under a captured graph.
            loss: of this step, relative to the zero predictor, a scalar on the device.
        Returns:
            the gradient norm before clipping, a scalar on the device; NaN if it is not measured.
        """
        found_inf = None if self.loss_scale is None else self.loss_scale.unscale(self.gradient)
        norm = torch.linalg.vector_norm(self.gradient) if self.measure_norm else self._no_norm
        divisor = None
        if self.max_grad_norm:
            # The fused kernels divide the gradients by this number. On a CPU that costs a second pass over memory, so
            # it is left out if nothing is clipped.
            divisor = (norm / self.max_grad_norm).clamp_(min=1.0)
            if divisor.device.type == "cpu" and divisor.item() == 1:
                divisor = None
        if self.name != "sgd":
            self.count += 1.0 if found_inf is None else 1.0 - found_inf
        for factor, tensors in self._groups:
            # Decoupled decay is per unit of the plain rate.
            decay = self.weight_decay if self.name != "adamw" else self.weight_decay / factor
            if self.name != "sgd":
                tensors = [*tensors, [], [self.count] * len(tensors[0])]
            self._fused(
                *tensors,
                lr=lr * factor,
                weight_decay=decay,
                maximize=False,
                grad_scale=divisor,
                found_inf=found_inf,
                **self._settings,
            )
        return norm
