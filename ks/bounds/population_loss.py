"""The population loss of a chain, exact and without sampling, and the range in which a sampled loss must lie."""

import torch

from ks.chain.dense import subtract_chain
from ks.moments.metric import Metric, MetricLike
from ks.moments.pieces import lower_gram
from ks.moments.second_moment import UNIT_MOMENT


@torch.no_grad()
def population_loss(weight: torch.Tensor, values, metric: MetricLike = None) -> float:
    """Return tr(G E C Eᵀ) / m with E = W − K_1 … K_L: the expected squared error per output for G = I.

    E is formed block by block in float64 (m·n·r multiply-adds for two factors), because ‖W‖² − 2⟨W, Ŵ⟩ + ‖Ŵ‖² would
    cancel to 1e-16 of ‖W‖²: an entry of E is accurate to a few times 1e-16 of that of W, so that losses are resolved
    down to about 1e-30 of that of the zero predictor.

    Args:
        weight: W, shape (m, n), any float dtype.
        values: the factors, shapes (a_l, b_l, c_l, d_l), output side first; multiplied in float64.
        metric: C = E[x xᵀ], a tensor of shape (n, n) or a `SecondMoment`; or a `Metric`, G ⊗ C. None means I.
    """
    return Metric.of(metric).loss(residual(weight, values)) / len(weight)


@torch.no_grad()
def residual(weight: torch.Tensor, values) -> torch.Tensor:
    """Return W − K_1 … K_L in float64, formed block by block."""
    wide = weight.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    return subtract_chain(wide, list(values))


@torch.no_grad()
def sampled_loss_range(
    weight: torch.Tensor, values, num_samples: int, metric: MetricLike = None
) -> tuple[float, float]:
    """Return a range that the mean squared error over random Gaussian inputs leaves once in 10^13 times.

    With λ the eigenvalues of G^{1/2} E C Eᵀ G^{1/2} / m, the mean over N samples is a weighted sum of squared normal
    variables with expectation Σλ. It lies between Σλ − 2√(t/N)·‖λ‖₂ and Σλ + 2√(t/N)·‖λ‖₂ + 2(t/N)·max λ with
    probability 1 − 2e^−t; here t = 30, and ‖λ‖₂ stands for max λ.

    Args:
        weight: W, shape (m, n), any float dtype.
        values: the factors, output side first.
        num_samples: N.
        metric: C = E[x xᵀ], a tensor of shape (n, n) or a `SecondMoment`; or a `Metric`, G ⊗ C. None means I.
    Returns:
        (lowest, highest), squared error per output.
    Source: Laurent and Massart, "Adaptive estimation of a quadratic functional by model selection" (2000), lemma 1.
    """
    metric = Metric.of(metric)
    rooted = metric.inputs.times_root(metric.weighted(residual(weight, values)))
    expected = UNIT_MOMENT.output_energy(rooted) / len(weight)
    narrow = (rooted if len(rooted) <= rooted.shape[1] else rooted.t()).float()  # float32 is enough for a range
    gram = lower_gram(narrow).tril_()
    norm = (2 * gram.norm() ** 2 - gram.diagonal().norm() ** 2).item() ** 0.5 / len(weight)
    ratio = 30 / num_samples
    return expected - 2 * ratio**0.5 * norm, expected + 2 * (ratio**0.5 + ratio) * norm
