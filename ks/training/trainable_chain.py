"""The chain that trains: its float32 factors, their initial values, and its products with a batch without autograd."""

from typing import Any

import torch

from ks.bounds.floors import no_floor_reason
from ks.chain.backend import choose_working_impl
from ks.chain.bmm import empty_values, float32_products
from ks.chain.passes import ChainPasses
from ks.cli.flags import TrainerConfig
from ks.files.weights import DTYPES
from ks.layer import KSLinear
from ks.training.optimizer import Optimizer
from ks.training.problem import Problem
from ks.training.samples import seeded_generator


class TrainableChain:
    """A chain of rank `config.rank` in internal coordinates: values in float32, multiplied in `config.dtype`.

    `weight` is W in internal coordinates, float64.

    `factors` are the values that train, `model` is the layer that has them. Training batches leave the outputs in the
    order `output_rows`: that in which the left-most product makes them, where the criterion is our own, since the mean
    squared error is the same in any order; that of W's rows for every other criterion. `output_metric` is G in this
    order, float32, None for I. `impl` is the backend and its reason.
    """

    def __init__(self, config: TrainerConfig, problem: Problem, weight: torch.Tensor):
        self._model = _initial_model(config, problem, weight)
        patterns, device = self._model.patterns, problem.device
        self.factors = [empty_values(pattern, device) for pattern in patterns]
        torch._foreach_copy_(self.factors, [factor.detach() for factor in self._model.factors])
        self.dtype, self.batch_last = DTYPES[config.dtype], config.bs_last
        settings: dict[str, Any] = {
            "batch_last": config.bs_last,
            "block_order": problem.edits.criterion_is_ours,
            "precision": config.float32_precision,
        }
        self.impl = choose_working_impl(config.impl, patterns, config.batch_size, device, self.dtype, **settings)
        self._passes = ChainPasses(patterns, impl=self.impl[0], **settings)
        self._kept: tuple = ()
        self.output_rows = self._passes.output_rows
        outputs, root = problem.metric.outputs, problem.validation_root
        self.output_metric = None
        if not outputs.is_isotropic:
            self.output_metric = outputs.matrix[self.output_rows][:, self.output_rows].to(device, torch.float32)
        self._root = None if root is None else root.to(device, torch.float32)

    @property
    def model(self) -> KSLinear:
        """The layer, with the values as they are now; the same object every time."""
        for place, factor in zip(self._model.factors, self.factors, strict=True):
            place.detach().copy_(factor)
        return self._model

    def _values(self) -> list[torch.Tensor]:
        return [factor.to(self.dtype) for factor in self.factors]

    def _rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return a view with one sample a row, or back to the layout of the chain."""
        return outputs.t() if self.batch_last else outputs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Ŵᵀ for a training batch, shape (batch, m), and keep what `backward` needs.

        Args:
            x: shape (batch, n), or (n, batch) with --bs_last.
        """
        values = self._values()
        prediction, *inner = self._passes.forward(x, values)
        self._kept = x, values, inner
        return self._rows(prediction)

    def backward(self, gradient: torch.Tensor, optimizer: Optimizer) -> None:
        """Write the gradients of the factors to `optimizer`; `gradient` is that of the last prediction, (batch, m)."""
        kept, self._kept = self._kept, ()  # memory that is free again stays in the cache for the next step
        self._passes.backward(self._rows(gradient), *kept, **optimizer.destination)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Ŵᵀ in the order of W's rows, times `Problem.validation_root`; shape (batch, m), float32.

        Args:
            x: as in `__call__`, of any batch size.
        """
        outputs = self._rows(self._passes.forward(x, self._values())[0])
        if self._passes.block_order:
            outputs = outputs.index_select(1, self.output_rows.argsort().to(x.device))
        outputs = outputs.float()
        if self._root is None:
            return outputs
        with float32_products(outputs):
            return outputs @ self._root


def _initial_model(config: TrainerConfig, problem: Problem, weight: torch.Tensor) -> KSLinear:
    """Return the chain at its initial values.

    random: the left-most factor is zero, so that the run starts from the zero predictor; the others keep the variance
    of their input. For coupled inputs, the rows of the right-most one are random combinations of those of W.
    hierarchical: the factorisation of W for the second moment of the inputs.
    """
    patterns = problem.chain.patterns(config.rank)
    if config.init == "hierarchical":
        start = KSLinear.from_dense(weight, patterns=patterns, metric=problem.metric, batch_last=config.bs_last)
        return start.float()
    model = KSLinear.from_patterns(patterns, batch_last=config.bs_last)
    generator = seeded_generator(config.seed, "init")
    model.reset_parameters(generator)
    with torch.no_grad():
        if no_floor_reason(problem.chain) is None and problem.metric.inputs.coupling(patterns[-1].a) is not None:
            sketch_rows(model.factors[-1], weight, patterns[-2].d, generator)
        model.factors[0].zero_()
    return model.to(problem.device)


@torch.no_grad()
def sketch_rows(factor: torch.Tensor, weight: torch.Tensor, row_groups: int, generator: torch.Generator) -> None:
    """Give the right-most factor rows that span random combinations of the rows of W, block by block, r for each.

    The rows of a block are an orthonormal basis: with inputs of second moment I in every column group, each keeps the
    variance of its input.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), section 4.1.

    Args:
        factor: values of shape (p, r·q, n/p, 1), updated in place.
        weight: W in internal coordinates, shape (m, n), float64.
        row_groups: q.
        generator: on the CPU.
    """
    (p, height, width, _), q = factor.shape, row_groups
    blocks = weight.view(-1, q, p, width).permute(2, 1, 0, 3)  # (m/q q) (p n/p) -> p q (m/q) (n/p)
    noise = torch.randn(p, q, height // q, blocks.shape[2], generator=generator, dtype=weight.dtype)
    basis = torch.linalg.qr((noise.to(weight.device) @ blocks).mT)[0]  # shape: (p, q, n/p, r)
    factor.copy_(basis.permute(0, 3, 1, 2).reshape(factor.shape))  # p q (n/p) r -> p (r q) (n/p) 1
