"""Dense test weights: random entries, an exact chain, low rank plus noise, a power law of singular values."""

import torch

from ks.chain.dense import dense_chain
from ks.chain.patterns import Chain
from ks.errors import UsageError
from ks.files.memory import check_fits

INIT_METHODS = (
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "normal",
    "exact_chain",
    "lowrank_plus_noise",
    "power_law",
)


def make_weight(
    rows: int,
    cols: int,
    method: str,
    *,
    seed: int = 0,
    chain: Chain | None = None,
    rank: int = 8,
    noise: float = 0.1,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Make a dense test weight in float32.

    xavier_*, kaiming_* (fan in, ReLU gain) and normal (standard deviation 1/√n) are independent entries.
    exact_chain: a random chain of rank `rank`, so that its study falls to zero at that rank.
    lowrank_plus_noise: U Vᵀ of rank `rank` plus noise of `noise` times its Frobenius norm.
    power_law: U diag(k^-alpha) Vᵀ with random orthogonal U, V.
    The structured kinds are scaled to ‖W‖_F² = m, so that the zero predictor has a loss of 1 on unit inputs.

    Args:
        rows, cols: m and n.
        method: one of `INIT_METHODS`.
        seed: of the random generator.
        chain: the family for exact_chain.
        rank: for exact_chain and lowrank_plus_noise.
        noise: ratio of Frobenius norms, noise to signal.
        alpha: exponent of the singular values.
    Returns:
        float32 tensor of shape (m, n).
    Raises:
        UsageError: it does not fit into memory, or its norm is zero or infinite.
    """
    values = 4 * rows * cols + (rank * (rows + cols) if method == "lowrank_plus_noise" else 0)
    check_fits(f"a {rows} × {cols} weight ({method})", 4 * values, "choose a smaller one")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(rows, cols)
    if method.startswith("xavier"):
        return getattr(torch.nn.init, f"{method}_")(weight, generator=generator)
    if method.startswith("kaiming"):
        return getattr(torch.nn.init, f"{method}_")(weight, nonlinearity="relu", generator=generator)
    if method == "normal":
        return weight.normal_(0.0, cols**-0.5, generator=generator)
    if method == "exact_chain":
        assert chain is not None
        weight = _random_chain(chain, rank, generator)
    elif method == "lowrank_plus_noise":
        left, right = (torch.randn(side, rank, generator=generator) for side in (rows, cols))
        signal, disturbance = left @ right.t(), torch.randn(rows, cols, generator=generator)
        weight = signal + disturbance * (noise * signal.norm() / disturbance.norm())
    else:
        size = min(rows, cols)
        left, right = (torch.linalg.qr(torch.randn(side, size, generator=generator))[0] for side in (rows, cols))
        weight = (left * torch.arange(1, size + 1).float() ** -alpha) @ right.t()
    norm = weight.double().norm().item()
    if not 0 < norm < float("inf"):
        raise UsageError(f"rank {rank}, noise {noise:g} and alpha {alpha:g} give a weight of norm {norm:g}; lower them")
    return weight * (rows**0.5 / norm)


def _random_chain(chain: Chain, rank: int, generator: torch.Generator) -> torch.Tensor:
    values = [torch.randn(*pattern, generator=generator) * pattern.c**-0.5 for pattern in chain.patterns(rank)]
    return dense_chain(values)
