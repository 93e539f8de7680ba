"""Small neighbouring factors multiplied with each other before they meet a large batch, and the gradients of that."""

import itertools

import torch

from ks.chain.patterns import Pattern, chainability

MERGE_BATCH = 256  # samples from which on merging pays


def merge_runs(patterns: tuple[Pattern, ...], batch: int = MERGE_BATCH) -> list[tuple[int, int]]:
    """Return the runs of neighbouring factors to multiply with each other, as (start, stop) ranges.

    A pass over the activations costs as much as a product with 64 × 64 blocks. So runs of factors with b, c ≤ 16
    (butterflies) become one factor with b, c ≤ 64 where the batch is large enough to pay for it.
    """
    runs = []
    start = 0
    while start < len(patterns):
        stop, merged = start + 1, patterns[start]
        while batch >= MERGE_BATCH and stop < len(patterns):
            rank = chainability(merged, patterns[stop])
            small = max(patterns[start].b, patterns[start].c, patterns[stop].b, patterns[stop].c) <= 16
            if rank is None or not small:
                break
            wider = merged_pattern(merged, patterns[stop])
            if max(wider.b, wider.c) > 64:
                break
            stop, merged = stop + 1, wider
        runs.append((start, stop))
        start = stop
    return runs


def merged_pattern(left: Pattern, right: Pattern) -> Pattern:
    """Return the pattern (a_1, b_1·d_1/d_2, c_2·a_2/a_1, d_2) that contains the product of two chainable factors."""
    return Pattern(left.a, left.b * left.d // right.d, right.c * right.a // left.a, right.d)


def partial_products(values: list[torch.Tensor], run: slice) -> list[torch.Tensor]:
    """Return the products of the first one, two, … factors of a run; the last one is the merged factor."""
    return list(itertools.accumulate(values[run], merge_factors))


_MERGE, _MERGE_LEFT, _MERGE_RIGHT = "ijusxt,iusxkt->ijxukt", "ijxukt,iusxkt->ijusxt", "ijusxt,ijxukt->iusxkt"


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
    return torch.einsum(_MERGE, *_merge_views(left, right)).reshape(_merged_shape(left, right))


def _merged_shape(left, right) -> Pattern:
    return merged_pattern(Pattern(*left.shape), Pattern(*right.shape))


def _merge_views(left, right):
    """Return left as (i, j, u, s, τ, t_2) and right as (i, u, s, τ, k, t_2)."""
    (a, b, _, d), (_, _, c, inner) = left.shape, right.shape
    rank = chainability(Pattern(*left.shape), Pattern(*right.shape))
    return left.reshape(a, b, -1, rank, d // inner, inner), right.reshape(a, -1, rank, d // inner, c, inner)


def unmerge_gradient(
    gradient: torch.Tensor, factors: list[torch.Tensor], partials: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the gradients of the factors of a run.

    Args:
        gradient: of the merged factor.
        factors: of the run, from left to right.
        partials: their `partial_products`.
    """
    gradients: list[torch.Tensor] = []
    for left, right in zip(partials[-2::-1], factors[:0:-1]):
        left_view, right_view = _merge_views(left, right)
        (a, b, u, _, x, t), k = left_view.shape, right.shape[2]
        view = gradient.reshape(a, b, x, u, k, t)
        gradients.insert(0, torch.einsum(_MERGE_RIGHT, left_view, view).reshape(right.shape))
        gradient = torch.einsum(_MERGE_LEFT, view, right_view).reshape(left.shape)
    return [gradient, *gradients]
