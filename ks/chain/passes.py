"""Forward and backward pass of a whole chain on one backend, without autograd.

Inside, an activation is a logical (features, batch) matrix, whatever its strides; between factors it is contiguous
along the batch. Values of shape (a, b, c, d) are multiplied in place where they lie in memory as (a, d, b, c), the
order of `ks.chain.bmm.empty_values`.
"""

import functools
from collections.abc import Sequence
from subprocess import CalledProcessError

import torch

from ks.chain import bmm, tiles
from ks.chain.backend import backend_module, choose_impl
from ks.chain.merge import merge_runs, merged_pattern, partial_products, unmerge_gradient
from ks.chain.patterns import Pattern
from ks.chain.splits import SplitMatrices, scale_gradient
from ks.errors import UsageError


class ChainPasses:
    """Forward and backward pass of one chain, W = K_1 … K_L, on batches of one size.

    Everything that follows from the sizes is settled here, once: which neighbouring factors are multiplied with each
    other before they meet the batch (`ks.chain.merge`), the backend of each product, and the order in which the
    outputs leave. 'triton' multiplies with its kernels where `torch.bmm` would copy an activation and a side of the
    factor is thin (`ks.chain.tiles`), and with `torch.bmm` elsewhere.

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
        self.device, self.dtype = device, dtype
        self.given = patterns = tuple(patterns)
        runs = merge_runs(patterns, batch)
        self.runs = [slice(start, stop) for start, stop in runs]
        self.patterns = [functools.reduce(merged_pattern, patterns[run]) for run in self.runs]
        chosen = backend_module(choose_impl(impl, device)[0])
        self.backends = [chosen if self._is_copied(index) else bmm for index in range(len(self.patterns))]

    def _is_copied(self, index: int) -> bool:
        """Return whether `torch.bmm` would copy an activation of a product, and kernels that copy none can take it."""
        a, _, _, d = pattern = self.patterns[index]
        first, last = index == 0, index == len(self.patterns) - 1
        interleaved = (first or last) and not self.batch_last
        copied = d > 1 and (interleaved or a > 1) and not (first and self.block_order)
        return copied and tiles.kernels_pay(pattern, self.batch, self.dtype.itemsize * 8)

    @property
    def output_rows(self) -> torch.Tensor:
        """The row of W behind each output feature, shape (m,), int64 on the CPU."""
        a, b, _, d = self.patterns[0]
        rows = torch.arange(a * b * d)
        return rows.view(a, b, d).transpose(1, 2).flatten() if self.block_order else rows

    def forward(self, x: torch.Tensor, values: list[torch.Tensor], keep: bool = True) -> list[torch.Tensor]:
        """Return y = x Wᵀ, with its features in the order `output_rows`, and the activations that `backward` needs.

        Args:
            x: shape (batch, n), or (n, batch) if batch_last.
            values: shapes (a_l, b_l, c_l, d_l), output side first.
            keep: whether a backward pass will follow.
        Returns:
            [y, then, if `keep`, the input of every product except the right-most, from left to right, each of shape
            (features, batch)]; y has the layout of x.
        """
        features = x if self.batch_last else x.t()
        values = [partial_products(values, run)[-1] for run in self.runs]
        y = x.new_empty((self.patterns[0].rows, self.batch) if self.batch_last else (self.batch, self.patterns[0].rows))
        out = y if self.batch_last else y.t()
        inner = [features]
        for index in range(len(values) - 1, 0, -1):
            entered = x.new_empty(self.patterns[index].rows, self.batch)
            self.backends[index].apply_factor(values[index], inner[0], entered, precision=self.precision)
            inner = [entered, *inner] if keep else [entered]
        order = {"out_block_order": True} if self.block_order else {}
        self.backends[0].apply_factor(values[0], inner[0], out, precision=self.precision, **order)
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
        scaling: SplitMatrices | None = None,
    ) -> list[torch.Tensor]:
        """Return the gradients that are needed of (x, *values), by default those of the values.

        Args:
            gradient: of y, in the layout and order of y.
            x, values: as given to `forward`.
            inner: the activations that it returned after y.
            needed: for x and each of the values, whether to return its gradient.
            out: places for the gradients of the values, in the memory order of `empty_values`, any float dtype.
            scaling: matrices that multiply the gradient of every factor; with them, products are at least as precise
                as they are.
        """
        features, gradient = (x, gradient) if self.batch_last else (x.t(), gradient.t())
        precision = self.precision
        for_x, *for_values = needed or [False] + [True] * len(values)
        products = [partial_products(values, run) for run in self.runs]
        merged = [partials[-1] for partials in products]
        last = max(index for index, run in enumerate(self.runs) if for_x or any(for_values[run]))
        if self.backends[0] is bmm:  # a copy, if one is needed, serves both products
            a, _, _, d = self.patterns[0]
            gradient = bmm.readable_blocks(gradient, a, d, self.block_order)
        arriving = [gradient]  # arriving[l] is the gradient of what the l-th product makes
        arriving += [x.new_empty(pattern.rows, self.batch) for pattern in self.patterns[1 : last + 1]]
        if for_x:
            x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
            arriving.append(x_gradient if self.batch_last else x_gradient.t())
        for index, factor in enumerate(merged[: len(arriving) - 1]):
            order = {"x_block_order": True} if self.block_order and index == 0 else {}
            apply_factor = self.backends[index].apply_factor
            apply_factor(factor.transpose(1, 2), arriving[index], arriving[index + 1], precision=precision, **order)
        gradients = []
        entering = [*inner, features]
        if scaling is not None and scaling.left:
            both = _promoted([*arriving[: last + 1], *entering[: last + 1]], scaling.left[0].dtype)
            arriving, entering = both[: last + 1], both[last + 1 :]
        for index, (partials, run) in enumerate(zip(products[: last + 1], self.runs)):
            if not any(for_values[run]):
                continue
            places = out[run] if out else [bmm.empty_values(f.shape, x.device, x.dtype) for f in values[run]]
            arrived, entered, rest = self._scaled(index, arriving[index], entering[index], scaling)
            in_place = len(partials) == 1 and places[0].dtype == arrived.dtype
            product = places[0] if in_place else bmm.empty_values(self.patterns[index], x.device, arrived.dtype)
            order = {"block_order": True} if self.block_order and index == 0 else {}
            self.backends[index].values_gradient(arrived, entered, product, precision=precision, **order)
            unmerged = [product] if len(partials) == 1 else unmerge_gradient(product, values[run], partials)
            for place, found, (left, right) in zip(places, unmerged, rest, strict=True):
                if left is not None or right is not None:
                    found = scale_gradient(found.to(place.dtype), left, right)
                if found is not place:
                    place.copy_(found)
            gradients += [place for place, wanted in zip(places, for_values[run]) if wanted]
        return [x_gradient, *gradients] if for_x else gradients

    def _scaled(self, index: int, arrived: torch.Tensor, entered: torch.Tensor, scaling: SplitMatrices | None):
        """Multiply the activations beside a product by the matrices that scale its gradient.

        A matrix is left for the gradient if that takes fewer multiply-adds: r a value instead of r a feature and
        sample, which is so if the batch exceeds c (or b, from the right); and within a run of several factors.

        Returns:
            (arrived, entered, for every factor of the run its two matrices that are left, or None).
        """
        factors = range(self.runs[index].start, self.runs[index].stop)
        if scaling is None:
            return arrived, entered, [(None, None)] * len(factors)
        rest = [scaling.beside(factor) for factor in factors]
        if len(factors) == 1:
            (left, right), (_, b, c, _) = rest[0], self.patterns[index]
            if left is not None and self.batch <= c:
                arrived, left = self._multiplied(left, arrived), None
            if right is not None and self.batch <= b:
                entered, right = self._multiplied(right, entered), None
            rest = [(left, right)]
        return arrived, entered, rest

    def _multiplied(self, matrices: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        out = features.new_empty(features.shape)
        bmm.apply_factor(matrices, features, out)
        return out


def _promoted(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return tensors of one dtype, converted by one kernel if `dtype` is wider."""
    wide = torch.promote_types(tensors[0].dtype, dtype)
    if wide == tensors[0].dtype:
        return tensors
    converted = [torch.empty_like(tensor, dtype=wide) for tensor in tensors]
    torch._foreach_copy_(converted, tensors)
    return converted


def choose_working_impl(
    impl: str, patterns: Sequence[Pattern], batch: int, device: torch.device, dtype: torch.dtype, **settings
) -> tuple[str, str]:
    """Choose a backend as `choose_impl` does, and try its kernels on random data against torch.bmm.

    Args:
        impl: 'auto', 'triton' or 'bmm'.
        patterns, batch, device, dtype: as in `ChainPasses`.
        settings: further arguments of `ChainPasses`.
    Returns:
        (backend, reason).
    Raises:
        UsageError: 'triton' was asked for by name, and it fails.
    """
    chosen, reason = choose_impl(impl, device)
    if chosen == "bmm":
        return chosen, reason
    from triton.errors import TritonError

    passes = ChainPasses(patterns, batch, device, dtype, impl=chosen, **settings)
    if all(backend is bmm for backend in passes.backends):
        return (
            chosen,
            f"{reason}; torch.bmm takes every product here: it copies nothing, or the kernels do not fit",
        )
    try:
        difference = _difference(passes, ChainPasses(patterns, batch, device, dtype, impl="bmm", **settings))
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError, CalledProcessError) as error:  # a missing C compiler is a RuntimeError
        failure = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"impl 'triton': the kernels fail here ({failure}); use 'auto' or 'bmm'") from error
    if not difference < 16 * max(torch.finfo(dtype).eps, 2**-11 if settings.get("precision", "ieee") == "tf32" else 0):
        raise UsageError(f"impl 'triton': the kernels are wrong here, by {difference:.1g} of a product; use 'bmm'")
    return chosen, reason


def _difference(ours: ChainPasses, other: ChainPasses) -> float:
    """Return by how much of its norm any result of two passes over random data differs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(ours.device, ours.dtype)

    values = [
        bmm.empty_values(p, ours.device, ours.dtype).copy_(normal(*p) * p.c**-0.5)
        for p in map(Pattern._make, ours.given)
    ]
    rows, cols = ours.patterns[0].rows, ours.patterns[-1].cols
    shapes = [(rows, ours.batch), (cols, ours.batch)] if ours.batch_last else [(ours.batch, rows), (ours.batch, cols)]
    gradient, x = (normal(*shape) for shape in shapes)
    results = []
    for passes in (ours, other):
        y, *inner = passes.forward(x, values)
        results.append([y, *passes.backward(gradient, x, values, inner, needed=[True] * (1 + len(values)))])
    pairs = [(mine.float(), theirs.float()) for mine, theirs in zip(*results)]
    return max(((mine - theirs).norm() / theirs.norm()).item() for mine, theirs in pairs)
