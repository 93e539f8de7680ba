"""The floors of a chain family on a layer of a model, for every useful rank at once."""

from dataclasses import dataclass

import numpy as np
import torch

from ks.bounds.floors import ChainBounds, Progress, chain_bounds, is_low_rank
from ks.bounds.low_rank import low_rank_energies_in
from ks.chain.patterns import Chain
from ks.moments.metric import Metric, MetricLike

KNOWN_RANKS = 8  # at which an upper bound is computed where it takes a descent
PLAN_TOLERANCE = 1e-3  # of that descent, which ends within about 1% of the one that runs are compared with


@dataclass(frozen=True)
class LayerFloors:
    """Bounds on the relative loss of the chains of one family on one weight.

    Args:
        chain: the family.
        lower: no chain of rank r = 0 … R loses a smaller fraction of `energy`, float64 of shape (R + 1,). R is
            the largest rank with fewer parameters than the dense weight, at most the rank of saturation.
        upper: the loss of the best known chain, shape (R + 1,).
        known: the ranks for which such a chain is known; between them, `upper` is interpolated. All where the floors
            are exact.
        energy: tr(G W C Wᵀ), of which losses are fractions: the output energy for G = I.
        other: the fraction of `other_energy` that those chains lose in another metric, shape (R + 1,), interpolated
            where `upper` is; None without one.
        other_energy: tr(H W C Wᵀ) of that metric H ⊗ C.
    """

    chain: Chain
    lower: np.ndarray
    upper: np.ndarray
    known: np.ndarray
    energy: float
    other: np.ndarray | None = None
    other_energy: float | None = None

    @property
    def ranks(self) -> np.ndarray:
        """Ranks 1 … R."""
        return np.arange(1, len(self.upper))

    @property
    def parameters(self) -> np.ndarray:
        """Parameters of ranks 1 … R."""
        return np.array([self.chain.parameters(int(rank)) for rank in self.ranks], dtype=np.int64)

    def is_interpolated(self, rank: int) -> bool:
        """Return whether the upper bound of a rank is interpolated."""
        return rank not in self.known


@torch.no_grad()
def layer_floors(
    weight: torch.Tensor,
    chain: Chain,
    metric: MetricLike,
    progress: Progress | None = None,
    other: Metric | None = None,
) -> LayerFloors:
    """Return the floors of every rank below the dense number of parameters, relative to the zero predictor.

    Low-rank chains, and two factors under inputs that couple no column groups, have exact floors for all ranks at once.
    Other chains get upper bounds at up to eight ranks; between them the logarithm of the loss is interpolated.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA.
        chain: with a floor (`ks.bounds.floors.no_floor_reason`).
        metric: C = E[x xᵀ], a tensor of shape (n, n) or a `SecondMoment`; or a `Metric`, G ⊗ C. None means I.
        progress: called with a few words before every longer computation; an exception from it ends the work.
        other: a metric with the same C, in which the best known chains are measured too.
    """
    metric = Metric.of(metric)
    bounds = chain_bounds(weight, chain, metric, tolerance=PLAN_TOLERANCE, progress=progress)
    energy, other_energy = metric.loss(weight), 0.0 if other is None else other.loss(weight)
    predict_zero_loss = energy / chain.rows
    highest = min((chain.parity_rank() or chain.saturation_rank + 1) - 1, chain.saturation_rank)
    lower = (bounds.curve[: highest + 1] / predict_zero_loss).clamp(0, 1).numpy()
    lower[0] = 1.0
    known, upper, in_other = np.arange(highest + 1), lower, None
    if other is not None and is_low_rank(chain):
        in_other = low_rank_energies_in(weight, metric, other)[: highest + 1].cpu().numpy() / other_energy
        in_other[0] = 1.0
    elif other is not None or not bounds.curve_is_exact:
        ranks = np.unique(np.geomspace(1, max(1, highest), KNOWN_RANKS).round().astype(int))
        ranks = np.r_[0, ranks[ranks <= highest]]
        measured = (_losses(bounds, int(rank), other) for rank in ranks[1:])
        found = np.array([(predict_zero_loss, other_energy), *measured])
        if not bounds.curve_is_exact:
            known, losses = ranks, np.minimum.accumulate(np.minimum(found[:, 0] / predict_zero_loss, 1.0))
            upper = np.maximum(_interpolated(ranks, losses), lower)
        if other is not None:
            in_other = _interpolated(ranks, found[:, 1] / other_energy)
    return LayerFloors(chain, lower, upper, known, energy, in_other, None if other is None else other_energy)


def _losses(bounds: ChainBounds, rank: int, other: Metric | None) -> tuple[float, float]:
    """Return the loss of the best known chain, and what it loses in another metric, 0 without one."""
    if other is None:
        return bounds.upper(rank), 0.0
    loss, error = bounds.best(rank)
    return loss, other.loss(error)


def _interpolated(known: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the losses of ranks 0 … known[-1], with logarithms that are linear between known ranks."""
    # A loss of 0 has no logarithm, and counts as 1e-30.
    values = np.exp(np.interp(np.arange(known[-1] + 1), known, np.log(np.maximum(losses, 1e-30))))
    return np.where(values <= 1e-29, 0.0, values)
