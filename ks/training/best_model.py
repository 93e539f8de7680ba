"""The model with the lowest validation loss of a run."""

import copy
import math

import torch

from ks.bounds.population_loss import population_loss
from ks.files.schema import BestRecord
from ks.layer import KSLinear
from ks.moments.metric import Metric
from ks.training.trainable_chain import TrainableChain


class BestModel:
    """The model with the lowest validation loss; with `keep_start`, the start unless its population loss was beaten.

    Args:
        chain: that trains, at its start.
        weight: W in internal units, float64.
        metric: of an error in internal units.
        keep_start: whether the start is a result in its own right (a factorisation of W).

    `kept` is the model, and `row` the curves' row of its epoch; empty before the first finite loss.
    """

    def __init__(self, chain: TrainableChain, weight: torch.Tensor, metric: Metric, keep_start: bool):
        self.chain, self.weight, self.metric = chain, weight, metric
        self.val_loss, self.kept = math.inf, copy.deepcopy(chain.model)
        self.row: dict = {}
        self.start = self.kept if keep_start else None

    def offer(self, val_loss: float, row: dict) -> None:
        """Keep the model as it is now if its validation loss is the lowest so far; `row` is its epoch's."""
        if val_loss < self.val_loss:
            self.val_loss, self.row, self.kept = val_loss, row, copy.deepcopy(self.chain.model)

    def state(self) -> dict:
        """Return everything that changes, for a resume state."""
        factors = [factor.detach() for factor in self.kept.factors]
        return {"val_loss": self.val_loss, "epoch": self.row["epoch"], "factors": factors}

    def restore(self, state: BestRecord, curves: list[dict]) -> None:
        """Put a state back; `curves` are those of the same resume state."""
        self.offer(state.val_loss, curves[state.epoch - 1])
        for factor, values in zip(self.kept.factors, state.factors, strict=True):
            factor.data.copy_(values)

    def population_loss(self, model: KSLinear | None = None) -> float:
        """Return the relative population loss of the kept model, or of another one."""
        return population_loss(self.weight, (model or self.kept).factors, self.metric)

    def chosen(self) -> KSLinear:
        """Return the start if it was never beaten, else the kept model."""
        if self.start is not None and self.population_loss(self.start) <= self.population_loss():
            return self.start
        return self.kept
