"""Forward and backward pass of a whole chain on one backend, without autograd; and the choice of the backend.

Inside, an activation is a logical (features, batch) matrix, whatever its strides; what passes from one factor to the
next is contiguous along the batch. Values of shape (a, b, c, d) are multiplied in place where they lie in memory as
(a, d, b, c), as `ks.batched.empty_values` lays them.
"""

import functools
import importlib.util
import itertools
import os

import torch

from ks import batched, tiles
from ks.patterns import Pattern, chainability
from ks.tiles import IMPLS


def choose_impl(
    impl: str, device: torch.device, patterns, batch: int, dtype: torch.dtype, precision: str = "ieee"
) -> tuple[str, str]:
    """Resolve `--impl` to a backend that runs here.

    Args:
        impl: 'auto', 'triton' or 'bmm'.
        device: where the chain runs.
        patterns: of the chain.
        batch: number of samples.
        dtype: of x.
        precision: of float32 products.
    Returns:
        (backend, reason).
    Raises:
        ValueError: unknown name, or a backend that cannot run here.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r}: choose one of {', '.join(IMPLS)}")
    if impl == "bmm":
        return "bmm", "as asked"
    missing = _why_no_triton(device)
    if impl == "triton":
        if missing:
            raise ValueError(f"impl 'triton': {missing}; use 'auto' or 'bmm'")
        return "triton", "as asked"
    if device.type != "cuda" or missing:
        return "bmm", missing or "the interpreter of Triton is for tests"
    return tiles.choose_backend(tuple(patterns), batch, dtype.itemsize * 8, precision)


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "Triton kernels need a CUDA device"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 or more"
    return None


def check_impl(impl: str, device: torch.device) -> None:
    """Raise ValueError, saying why, unless the backend `impl` can run on `device`."""
    choose_impl(impl, device, (Pattern(1, 1, 1, 1),), 1, torch.float32)


def _backend(x, values, batch: int, impl: str, precision: str):
    """The module that multiplies."""
    if impl == "bmm" or (impl == "auto" and x.device.type == "cpu"):
        return batched
    return _chosen_module(impl, x.device, tuple(Pattern(*factor.shape) for factor in values), batch, x.dtype, precision)


@functools.cache
def _chosen_module(*choice):
    name, _ = choose_impl(*choice)
    if name == "bmm":
        return batched
    from ks import kernels  # here, since it imports Triton

    return kernels


def rows_of(factor: torch.Tensor) -> int:
    """Rows a·b·d of the factor with these values."""
    a, b, _, d = factor.shape
    return a * b * d


def block_order_rows(pattern: Pattern) -> torch.Tensor:
    """Which row of W each output is in block order, for a left-most factor of `pattern`; shape (a·b·d,), int64."""
    a, b, _, d = pattern
    return torch.arange(a * b * d).view(a, b, d).transpose(1, 2).flatten()


def chain_forward(
    x: torch.Tensor,
    values: list[torch.Tensor],
    batch_last: bool = False,
    block_order: bool = False,
    impl: str = "auto",
    precision: str = "ieee",
    keep: bool = True,
) -> list[torch.Tensor]:
    """y = x Wᵀ for W = K_1 … K_L, and what `chain_backward` needs besides.

    Args:
        x: shape (batch, n), or (n, batch) if batch_last.
        values: shapes (a_l, b_l, c_l, d_l), output side first, of the dtype and on the device of x.
        batch_last: which layout.
        block_order: leave the outputs in the order (a, d, b) in which the left-most factor makes them, which saves a
            permutation: y[..., block_order_rows(pattern)] instead of y.
        impl, precision: as in `choose_impl`.
        keep: whether a backward pass will follow.
    Returns:
        [y, and if `keep` what enters each factor but the right-most, left-most first, shape (features, batch)]; y has
        the layout of x.
    """
    features = x if batch_last else x.t()
    batch = features.shape[1]
    values = [partial[-1] for partial in _merged(values, batch)]
    backend = _backend(x, values, batch, impl, precision)
    y = x.new_empty((rows_of(values[0]), batch) if batch_last else (batch, rows_of(values[0])))
    out = y if batch_last else y.t()
    pair = _pair_tiles(backend, values, x, batch)
    if pair is not None:
        inner = [x.new_empty(rows_of(values[1]), batch)] if keep else []
        backend.apply_pair(*values, features, out, *inner or [None], pair, block_order=block_order, precision=precision)
        return [y, *inner]
    inner = [features]
    for factor in values[:0:-1]:
        entered = x.new_empty(rows_of(factor), batch)
        backend.apply_factor(factor, inner[0], entered, precision=precision)
        inner = [entered, *inner] if keep else [entered]
    backend.apply_factor(values[0], inner[0], out, out_block_order=block_order, precision=precision)
    return [y, *inner[:-1]] if keep else [y]


def chain_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    values: list[torch.Tensor],
    inner: list[torch.Tensor],
    batch_last: bool = False,
    block_order: bool = False,
    impl: str = "auto",
    precision: str = "ieee",
    needed: list[bool] | None = None,
    out: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Gradients of what is needed of (x, *values); by default of the values.

    Args:
        gradient: of y, in the layout of x.
        x, values, batch_last, block_order, impl, precision: as given to `chain_forward`.
        inner: what it returned after y.
        needed: for x and each of the values, whether to return its gradient.
        out: where to put the gradients of the values, in memory as `empty_values` lays them, any float dtype.
    """
    features, gradient = (x, gradient) if batch_last else (x.t(), gradient.t())
    batch = features.shape[1]
    for_x, *for_values = needed or [False] + [True] * len(values)
    runs = _merged(values, batch)
    merged = [partial[-1] for partial in runs]
    stops = itertools.accumulate(map(len, runs))
    spans = [slice(stop - len(partials), stop) for stop, partials in zip(stops, runs)]
    products = len(runs) if for_x else max(index for index, span in enumerate(spans) if any(for_values[span]))
    backend = _backend(x, merged, batch, impl, precision)
    if backend is batched:  # a copy, if one is needed, serves both products
        gradient = batched.readable_blocks(gradient, merged[0].shape[0], merged[0].shape[3], block_order)
    arriving = [gradient]  # arriving[l] is the gradient of what the l-th merged factor makes
    arriving += [x.new_empty(rows_of(factor), batch) for factor in merged[1 : products + 1]]
    if for_x:
        x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
        arriving.append(x_gradient if batch_last else x_gradient.t())
    pair = _pair_tiles(backend, merged, x, batch) if for_x else None
    if pair is not None:
        _, between, last = arriving
        backend.apply_pair(
            *merged, gradient, last, between, pair, transposed=True, block_order=block_order, precision=precision
        )
    else:
        for index, factor in enumerate(merged[:products]):
            first = block_order and index == 0
            backend.apply_factor(
                factor.transpose(1, 2), arriving[index], arriving[index + 1], x_block_order=first, precision=precision
            )
    gradients = []
    for index, (partials, span, entered) in enumerate(zip(runs, spans, [*inner, features])):
        if not any(for_values[span]):
            continue
        places = out[span] if out else [batched.empty_values(f.shape, x.device, x.dtype) for f in values[span]]
        direct = len(partials) == 1 and places[0].dtype == x.dtype
        product = places[0] if direct else batched.empty_values(merged[index].shape, x.device, x.dtype)
        first = block_order and index == 0
        backend.values_gradient(arriving[index], entered, product, block_order=first, precision=precision)
        if not direct:
            for place, found in zip(places, _unmerge(product, values[span], partials)):
                place.copy_(found)
        gradients += [place for place, wanted in zip(places, for_values[span]) if wanted]
    return [x_gradient, *gradients] if for_x else gradients


_MERGE, _MERGE_LEFT, _MERGE_RIGHT = "ijusxt,iusxkt->ijxukt", "ijxukt,iusxkt->ijusxt", "ijusxt,ijxukt->iusxkt"


def merge_factors(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Values of the product of two chainable factors, one factor again.

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
    return tiles.merged_pattern(Pattern(*left.shape), Pattern(*right.shape))


def _merge_views(left, right):
    """left as (i, j, u, s, τ, t_2) and right as (i, u, s, τ, k, t_2)."""
    (a, b, _, d), (_, _, c, inner) = left.shape, right.shape
    rank = chainability(Pattern(*left.shape), Pattern(*right.shape))
    return left.reshape(a, b, -1, rank, d // inner, inner), right.reshape(a, -1, rank, d // inner, c, inner)


def _merged(values, batch: int) -> list[list[torch.Tensor]]:
    """For each run of `ks.tiles.merge_runs` the products of its first one, two, … factors."""
    if batch < tiles.MERGE_BATCH:
        return [[factor] for factor in values]
    runs = tiles.merge_runs(tuple(Pattern(*factor.shape) for factor in values), batch)
    return [list(itertools.accumulate(values[start:stop], merge_factors)) for start, stop in runs]


def _unmerge(gradient, factors, partials) -> list[torch.Tensor]:
    """Gradients of the factors of a run from that of their product."""
    gradients = []
    for left, right in zip(partials[-2::-1], factors[:0:-1]):
        left_view, right_view = _merge_views(left, right)
        (a, b, u, _, x, t), k = left_view.shape, right.shape[2]
        view = gradient.reshape(a, b, x, u, k, t)
        gradients.insert(0, torch.einsum(_MERGE_RIGHT, left_view, view).reshape(right.shape))
        gradient = torch.einsum(_MERGE_LEFT, view, right_view).reshape(left.shape)
    return [gradient, *gradients]


def _pair_tiles(backend, values, x, batch: int):
    """Tiles of the fused pair where the chain is one and the backend fuses, else None."""
    if backend is batched or len(values) != 2:
        return None
    patterns = (Pattern(*factor.shape) for factor in values)
    return tiles.pair_tiles(*patterns, batch, x.element_size() * 8, backend.architecture(x.device))
