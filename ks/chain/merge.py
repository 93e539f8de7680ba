"""Small neighbouring factors multiplied with each other before they meet a large batch."""

import torch

from ks.chain.patterns import Pattern, chainability

MERGE_BATCH = 256  # samples from which on merging pays


def merge_runs(patterns: tuple[Pattern, ...]) -> list[tuple[int, int]]:
    """Return the runs of neighbouring factors to multiply with each other, as (start, stop) ranges.

    A pass over the activations costs as much as a product with 64 × 64 blocks. So runs of factors with b, c ≤ 16
    (butterflies) become one factor with b, c ≤ 64.
    """
    runs: list[tuple[int, int]] = []
    merged = patterns[0]
    for index, pattern in enumerate(patterns):
        start = runs[-1][0] if runs else 0
        small = max(patterns[start].b, patterns[start].c, pattern.b, pattern.c) <= 16
        wider = merged_pattern(merged, pattern) if runs and small and chainability(merged, pattern) else None
        if wider is not None and max(wider.b, wider.c) <= 64:
            runs[-1], merged = (start, index + 1), wider
        else:
            runs.append((index, index + 1))
            merged = pattern
    return runs


def merged_pattern(left: Pattern, right: Pattern) -> Pattern:
    """Return the pattern (a_1, b_1·d_1/d_2, c_2·a_2/a_1, d_2) that contains the product of two chainable factors."""
    return Pattern(left.a, left.b * left.d // right.d, right.c * right.a // left.a, right.d)


def merge_factors(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the values of the product of two chainable factors, which is one factor again.

    With ρ the chainability number, w = d_1 / d_2 and t = τ·d_2 + t_2:
    merged[i, j·w + τ, (u, k), t_2] = Σ_s left[i, j, u·ρ + s, t] · right[(i, u), s·w + τ, k, t_2].

    Args:
        left: shape (a_1, b_1, c_1, d_1).
        right: shape (a_2, b_2, c_2, d_2).
    Returns:
        tensor of shape (a_1, b_1·w, c_2·a_2/a_1, d_2).
    """
    first, second = Pattern(*left.shape), Pattern(*right.shape)
    (a, b, _, d), rank, inner = first, chainability(first, second) or 0, second.d
    left = left.reshape(a, b, -1, rank, d // inner, inner)  # a b (u ρ) (τ t) -> a b u ρ τ t
    right = right.reshape(a, -1, rank, d // inner, second.c, inner)  # (a u) (ρ τ) c t -> a u ρ τ c t
    return torch.einsum("ijusxt,iusxkt->ijxukt", left, right).reshape(merged_pattern(first, second))
