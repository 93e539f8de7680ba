"""How much of an error the Gauss–Newton step of every factor removes, at first and at last.

A step that removes the fraction h has a noise of about h (n + c) / B, with n inputs, c inputs of a block of the
left-most factor and B samples of a batch; from 2 on, errors grow.
"""

from collections.abc import Sequence

import torch

from ks.chain.patterns import Pattern

# At this rate, a step removes 1 / (largest eigenvalue of the second moment of a batch) of an error at first; white
# inputs have (1 + √(n/B))² there.
REFERENCE_LR = 1e-3
# Near-ties of singular values leave slow directions, and so do coupled inputs or outputs. So the step grows to GROWTH
# times what it is at first, but not at once: a large step diverges while the factors still change fast.
GROWTH = 5.0
GROWTH_STEPS = 1000  # until half of it; under white inputs slower before and faster after
# Under white inputs it grows until it removes MOST_STEP of an error, h, and the inner factors, whose c inputs are few,
# grow by the square, until their noise h c / B is INNER_NOISE.
MOST_STEP, INNER_NOISE = 0.03, 0.4
# Largest noise of a step at first and at last, h (n + c) / B with c inputs of a block of the left-most factor: 1.2 at
# first diverged at saturation in batches of 8, 2.0 at last trained all layers of MiniLM tried. The largest eigenvalue
# of a coupled G multiplies it for the left-most factor, whose step G does not divide.
FIRST_NOISE, LAST_NOISE = 0.8, 2.0


def step_sizes(
    patterns: Sequence[Pattern], step: float, batch_size: int, rate_decays: bool
) -> tuple[list[float], list[float]]:
    """Return what the step of each factor is multiplied by, at first and at last, for a metric that couples no groups.

    Args:
        patterns: of a chainable chain, output side first.
        step: the fraction of an error that a step removes at `REFERENCE_LR`.
        batch_size: B.
        rate_decays: whether the schedule takes lr to zero; otherwise the noise of larger steps stays.
    """
    growth = min(GROWTH, LAST_NOISE / _noise(patterns, step, batch_size), MOST_STEP / step) if rate_decays else 1.0
    growth = max(1.0, growth)
    inner = [max(1.0, INNER_NOISE * batch_size / pattern.c / step) for pattern in patterns[:-1]]
    return [1.0] * len(patterns), [*(min(growth**2, limit) for limit in inner), growth]


def coupled_step_sizes(
    patterns: Sequence[Pattern], step: float, batch_size: int, outputs: torch.Tensor | None
) -> tuple[list[float], list[float]]:
    """Return the same for a metric that couples groups.

    Args:
        patterns, step, batch_size: as in `step_sizes`.
        outputs: G if it couples row groups, shape (m, m); otherwise None.
    """
    noises = [_noise(patterns, step, batch_size)] * len(patterns)
    if outputs is not None:
        noises[0] *= torch.linalg.eigvalsh(outputs)[-1].item()
    first = [min(1.0, FIRST_NOISE / noise) for noise in noises]
    growth = min(GROWTH, LAST_NOISE / max(size * noise for size, noise in zip(first, noises)))
    return first, [size * growth for size in first]


def _noise(patterns: Sequence[Pattern], step: float, batch_size: int) -> float:
    return step * (patterns[-1].cols + patterns[0].c) / batch_size
