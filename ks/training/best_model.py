"""The model with the lowest validation loss of a run."""

import copy
import math

import torch

from ks.bounds.population_loss import population_loss
from ks.files.schema import BestRecord
from ks.layer import KSLinear
from ks.moments.second_moment import SecondMoment
from ks.training.trainable_chain import TrainableChain


class BestModel:
    """The model with the lowest validation loss; with `keep_start`, the start unless its population loss was beaten.

    Args:
        chain: that trains.
        weight: W in internal units, float64.
        moment: second moment of x in internal units.
        keep_start: whether the start is a result in its own right (a factorisation of W).
    """

    def __init__(self, chain: TrainableChain, weight: torch.Tensor, moment: SecondMoment, keep_start: bool):
        self.chain, self.weight, self.moment = chain, weight, moment
        self.start = copy.deepcopy(chain.model) if keep_start else None
        self.val_loss = math.inf
        self.row: dict | None = None
        self.kept: KSLinear | None = None

    def offer(self, val_loss: float, row: dict) -> None:
        """Keep the model as it is now if its validation loss is the lowest so far; `row` is its epoch's."""
        if val_loss < self.val_loss:
            self.val_loss, self.row, self.kept = val_loss, row, copy.deepcopy(self.chain.model)

    def state(self) -> dict:
        """Return everything that changes, for a checkpoint."""
        assert self.row is not None
        assert self.kept is not None
        return {
            "val_loss": self.val_loss,
            "epoch": self.row["epoch"],
            "factors": [factor.detach() for factor in self.kept.factors],
        }

    def restore(self, state: BestRecord, curves: list[dict]) -> None:
        """Put a state back; `curves` are those of the same checkpoint."""
        self.offer(state.val_loss, curves[state.epoch - 1])
        assert self.kept is not None
        for factor, values in zip(self.kept.factors, state.factors, strict=True):
            factor.data.copy_(values)

    def population_loss(self) -> float:
        """Return the relative population loss of the kept model."""
        assert self.kept is not None
        return population_loss(self.weight, self.kept.factors, self.moment)

    def chosen(self) -> KSLinear:
        """Return the start if it was never beaten, else the kept model."""
        assert self.kept is not None
        if self.start is None:
            return self.kept
        start_loss = population_loss(self.weight, self.start.factors, self.moment)
        return self.start if start_loss <= self.population_loss() else self.kept
