"""Random second moments of every kind, and the loss under them by its definition: shared by several tests."""

import torch

from ks.moments.moments_file import PARTS, InputMoments
from ks.moments.second_moment import VectorSums

KINDS = ("regular", "steep", "low energy feature", "singular", "rank one", "block diagonal", "isotropic")


def random_moment(kind, features, groups=1, seed=0):
    """Return C, shape (n, n); `groups`: of block diagonal ones."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(4 * features, features, dtype=torch.float64, generator=generator)
    mixing = torch.randn(features, features, dtype=torch.float64, generator=generator)
    if kind == "isotropic":
        return 4.0 * torch.eye(features, dtype=torch.float64)
    if kind == "steep":  # condition 1e9 or so
        mixing = torch.linalg.qr(mixing)[0] * torch.logspace(0, -4.5, features, dtype=torch.float64)[:, None]
    if kind == "low energy feature":
        mixing[:, 0] *= 1e-6
    if kind == "singular":
        samples = samples[: max(1, features // 2)]
    if kind == "rank one":
        samples = samples[:1]
    if kind == "block diagonal":
        width = features // groups
        mixing = mixing * torch.block_diag(*[torch.ones(width, width, dtype=torch.float64)] * groups)
        return mixing.mT @ mixing
    inputs = samples @ mixing
    return inputs.mT @ inputs / len(inputs)


def measured_moments(weights, without_gradients=(), seed=0):
    """Return moments of the inputs of weights, shape (m, n), by name, and of the gradients at their outputs."""
    generator = torch.Generator().manual_seed(seed)

    def sums(width):
        mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -1.5, width)[:, None]
        return VectorSums.of(torch.randn(6 * width, width, generator=generator) @ mixing)

    train = {name: sums(weight.shape[1]) for name, weight in weights.items()}
    gradients = {name: sums(weight.shape[0]) for name, weight in weights.items() if name not in without_gradients}
    names = {name: name for name in weights}
    return InputMoments(train, {}, names, dict.fromkeys(names, 1), gradients=gradients, loss="a loss", unit="nats")


def assert_same_moments(one, other, tolerance=0.0, of_gradients=0.0):
    """Check that two moments hold the same sums, up to tolerances for the order of the additions."""
    for name in ("aliases", "batches", "transposed", "model", "loss", "unit"):
        assert getattr(one, name) == getattr(other, name)
    for part in PARTS:
        sums, others = getattr(one, part), getattr(other, part)
        allowed = of_gradients if "gradients" in part else tolerance
        assert sums.keys() == others.keys()
        for name in sums:
            assert sums[name].count == others[name].count
            torch.testing.assert_close(sums[name].sum_xx, others[name].sum_xx, rtol=allowed, atol=allowed)
            torch.testing.assert_close(sums[name].sum_x, others[name].sum_x, rtol=allowed, atol=allowed)


def weighted_loss(weight, dense, moment):
    """Return tr((W − Ŵ) C (W − Ŵ)ᵀ) / m."""
    error = weight - dense
    return (error @ moment @ error.mT).trace().item() / len(weight)
