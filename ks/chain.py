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


class ChainPasses:
    """Forward and backward pass of one chain, W = K_1 … K_L, on batches of one size.

    Everything that follows from the sizes is settled here, once: which neighbouring factors are multiplied with each
    other before they meet the batch (`ks.tiles.merge_runs`), the backend, and the order in which the outputs leave.

    Args:
        patterns: (a_l, b_l, c_l, d_l) of the factors, output side first.
        batch: samples of a batch.
        device, dtype: of x and of the values.
        batch_last: x and y have the shapes (n, batch) and (m, batch) instead of (batch, n) and (batch, m).
        block_order: leave the outputs in the order in which the left-most product makes them, which saves a
            permutation; `output_rows` says which one it is.
        impl, precision: as in `choose_impl`.
    """

    def __init__(
        self,
        patterns,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch_last: bool = False,
        block_order: bool = False,
        impl: str = "auto",
        precision: str = "ieee",
    ):
        self.batch, self.batch_last, self.block_order, self.precision = batch, batch_last, block_order, precision
        patterns = tuple(patterns)
        runs = tiles.merge_runs(patterns, batch)
        self.runs = [slice(start, stop) for start, stop in runs]
        self.patterns = [functools.reduce(tiles.merged_pattern, patterns[run]) for run in self.runs]
        self.backend = _module(choose_impl(impl, device, self.patterns, batch, dtype, precision)[0])
        self.pair = None
        if self.backend is not batched and len(self.patterns) == 2:
            arch = self.backend.architecture(device)
            self.pair = tiles.pair_tiles(*self.patterns, batch, dtype.itemsize * 8, arch)

    @property
    def output_rows(self) -> torch.Tensor:
        """Row of W that each output feature is, shape (m,), int64 on the CPU."""
        a, b, _, d = self.patterns[0]
        rows = torch.arange(a * b * d)
        return rows.view(a, b, d).transpose(1, 2).flatten() if self.block_order else rows

    def forward(self, x: torch.Tensor, values: list[torch.Tensor], keep: bool = True) -> list[torch.Tensor]:
        """y = x Wᵀ with its features in the order `output_rows`, and what `backward` needs besides.

        Args:
            x: shape (batch, n), or (n, batch) if batch_last.
            values: shapes (a_l, b_l, c_l, d_l), output side first.
            keep: whether a backward pass will follow.
        Returns:
            [y, then, if `keep`, the input of every product except the right-most, from left to right, each of shape
            (features, batch)]; y has the layout of x.
        """
        features = x if self.batch_last else x.t()
        values = [partial[-1] for partial in self._products(values)]
        y = x.new_empty((self.patterns[0].rows, self.batch) if self.batch_last else (self.batch, self.patterns[0].rows))
        out = y if self.batch_last else y.t()
        order = {"block_order": self.block_order, "precision": self.precision}
        if self.pair is not None:
            inner = [x.new_empty(self.patterns[1].rows, self.batch)] if keep else []
            self.backend.apply_pair(*values, features, out, *inner or [None], self.pair, **order)
            return [y, *inner]
        inner = [features]
        for factor, pattern in zip(values[:0:-1], self.patterns[:0:-1]):
            entered = x.new_empty(pattern.rows, self.batch)
            self.backend.apply_factor(factor, inner[0], entered, precision=self.precision)
            inner = [entered, *inner] if keep else [entered]
        self.backend.apply_factor(values[0], inner[0], out, out_block_order=self.block_order, precision=self.precision)
        return [y, *inner[:-1]] if keep else [y]

    def backward(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        values: list[torch.Tensor],
        inner: list[torch.Tensor],
        *,
        needed: list[bool] | None = None,
        out: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Gradients of what is needed of (x, *values); by default of the values.

        Args:
            gradient: of y, in the layout and order of y.
            x, values: as given to `forward`.
            inner: what it returned after y.
            needed: for x and each of the values, whether to return its gradient.
            out: where to put the gradients of the values, in memory as `empty_values` lays them, any float dtype.
        """
        features, gradient = (x, gradient) if self.batch_last else (x.t(), gradient.t())
        backend, precision = self.backend, self.precision
        for_x, *for_values = needed or [False] + [True] * len(values)
        products = self._products(values)
        merged = [partials[-1] for partials in products]
        last = max(index for index, run in enumerate(self.runs) if for_x or any(for_values[run]))
        if backend is batched:  # a copy, if one is needed, serves both products
            a, _, _, d = self.patterns[0]
            gradient = batched.readable_blocks(gradient, a, d, self.block_order)
        arriving = [gradient]  # arriving[l] is the gradient of what the l-th product makes
        arriving += [x.new_empty(pattern.rows, self.batch) for pattern in self.patterns[1 : last + 1]]
        if for_x:
            x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
            arriving.append(x_gradient if self.batch_last else x_gradient.t())
        if self.pair is not None and for_x:
            order = {"block_order": self.block_order, "precision": precision}
            backend.apply_pair(*merged, gradient, arriving[2], arriving[1], self.pair, transposed=True, **order)
        else:
            for index, factor in enumerate(merged[: len(arriving) - 1]):
                first = self.block_order and index == 0
                backend.apply_factor(
                    factor.transpose(1, 2),
                    arriving[index],
                    arriving[index + 1],
                    x_block_order=first,
                    precision=precision,
                )
        gradients = []
        for index, (partials, run, entered) in enumerate(zip(products, self.runs, [*inner, features])):
            if not any(for_values[run]):
                continue
            places = out[run] if out else [batched.empty_values(f.shape, x.device, x.dtype) for f in values[run]]
            direct = len(partials) == 1 and places[0].dtype == x.dtype
            product = places[0] if direct else batched.empty_values(self.patterns[index], x.device, x.dtype)
            first = self.block_order and index == 0
            backend.values_gradient(arriving[index], entered, product, block_order=first, precision=precision)
            if not direct:
                for place, found in zip(places, _unmerge(product, values[run], partials)):
                    place.copy_(found)
            gradients += [place for place, wanted in zip(places, for_values[run]) if wanted]
        return [x_gradient, *gradients] if for_x else gradients

    def _products(self, values) -> list[list[torch.Tensor]]:
        """For each run of merged factors the products of its first one, two, … factors."""
        return [list(itertools.accumulate(values[run], merge_factors)) for run in self.runs]


def _module(backend: str):
    """The module that multiplies; Triton is imported only where it is used."""
    if backend == "bmm":
        return batched
    from ks import kernels

    return kernels


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
