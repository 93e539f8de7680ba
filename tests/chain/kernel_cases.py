"""What every kernel is tried on, and the rule by which it passes: shared by the interpreter's tests and the GPU's."""

import random
from math import prod

import torch

from ks.chain import bmm
from ks.chain.merge import MERGE_BATCH
from ks.chain.passes import ChainPasses
from ks.chain.patterns import Pattern, make_chain
from ks.chain.reference import chain_to_dense

# Odd, prime and ragged sizes, with one and with several i and groups of t; c on both sides of what a program holds.
PATTERNS = [Pattern(*p) for p in ((1, 24, 40, 4), (3, 70, 17, 4), (2, 5, 7, 12), (2, 19, 1, 4), (1, 7, 150, 4))]
# (pattern, whether x has the batch contiguous, whether y has, batch, transposed)
FACTOR_CASES = [(p, x, not x, batch, x) for p in PATTERNS for x, batch in ((False, 20), (True, 33))]
FACTOR_CASES += [(PATTERNS[0], False, False, 1, False), (PATTERNS[0], True, True, 200, True)]
# (pattern, whether the gradient has the batch contiguous, whether x has, batch)
GRADIENT_CASES = [(p, g, not g, batch) for p in PATTERNS for g, batch in ((False, 20), (True, 300))]
GRADIENT_CASES += [(PATTERNS[0], False, False, 1)]
# What a GPU tries besides.
STUDY = make_chain(2048, 4096).patterns(16)[0]
STUDY_FACTOR, STUDY_GRADIENT = (STUDY, False, False, 1000, False), (STUDY, False, True, 5000)


def random_values(pattern, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*pattern, generator=generator) * pattern.c**-0.5
    return bmm.empty_values(pattern, device, dtype).copy_(values)


def random_matrix(features, batch, dtype, contiguous_batch, device="cpu", seed=1):
    """(features, batch), contiguous in the batch or in the features."""
    matrix = torch.randn(features, batch, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return matrix if contiguous_batch else matrix.t().contiguous().t()


class Guarded:
    """A copy of a tensor amid NaN: before it, behind it, and in a gap behind each of its rows.

    A read outside turns the result into NaN, and `check` finds a write outside.

    Args:
        tensor: without gaps in memory, any order of dimensions.
    """

    MARGIN, GAP = 160, 32

    def __init__(self, tensor):
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        *outer, row = (tensor.shape[dim] for dim in order)
        rows = prod(outer)
        self._all = torch.full((2 * self.MARGIN + rows * (row + self.GAP),), torch.nan, dtype=tensor.dtype)
        self._all = self._all.to(tensor.device)
        inside = self._all[self.MARGIN : -self.MARGIN].view(*outer, row + self.GAP)[..., :row]
        self.tensor = inside.permute(*(order.index(dim) for dim in range(tensor.dim())))
        self.tensor.copy_(tensor)

    def check(self):
        assert self._all.isnan().sum() == self._all.numel() - self.tensor.numel(), "a kernel wrote outside, or NaN"
        assert self.tensor.isfinite().all()


def assert_as_exact_as_plain(ours, plain, exact, block_dims):
    """Relative Frobenius error at most twice that of plain torch in the same dtype plus one epsilon, block by block.

    Args:
        ours, plain: two results in the dtype under test.
        exact: the result in float64.
        block_dims: dimensions that make up one block; all others number the blocks.
    """
    assert ours.shape == plain.shape == exact.shape
    epsilon = torch.finfo(ours.dtype).eps
    norm = exact.norm(dim=block_dims)
    our_error = (ours.double() - exact).norm(dim=block_dims) / norm
    plain_error = (plain.double() - exact).norm(dim=block_dims) / norm
    worst = (our_error / (2 * plain_error + epsilon)).max().item()
    assert worst <= 1, f"error is {worst:.3g} times what is allowed"


def check_factor(kernels, case, dtype, device="cpu"):
    """y = K x, or Kᵀ x, in one of FACTOR_CASES."""
    pattern, x_layout, out_layout, batch, transposed = case
    values = random_values(pattern, dtype, device)
    factor = values.transpose(1, 2) if transposed else values
    a, b, c, d = factor.shape
    x = random_matrix(a * c * d, batch, dtype, x_layout, device)
    out = random_matrix(a * b * d, batch, dtype, out_layout, device).fill_(torch.nan)
    guarded = [Guarded(tensor) for tensor in (values, x, out)]
    ours = [buffer.tensor for buffer in guarded]
    kernels.apply_factor(ours[0].transpose(1, 2) if transposed else ours[0], *ours[1:])
    for buffer in guarded:
        buffer.check()
    plain, exact = torch.empty_like(out), torch.empty_like(out, dtype=torch.float64)
    bmm.apply_factor(factor, x, plain)
    bmm.apply_factor(factor.double(), x.double(), exact)
    assert_as_exact_as_plain(*(y.reshape(a, b, d, batch) for y in (ours[2], plain, exact)), (1, 3))


def check_values_gradient(kernels, case, dtype, device="cpu", out_dtype=None):
    """The gradient of the values, in one of GRADIENT_CASES."""
    pattern, g_layout, x_layout, batch = case
    gradient = random_matrix(pattern.rows, batch, dtype, g_layout, device)
    x = random_matrix(pattern.cols, batch, dtype, x_layout, device, seed=2)
    plain, exact = (bmm.empty_values(pattern, device, kind) for kind in (dtype, torch.float64))
    out = bmm.empty_values(pattern, device, out_dtype or dtype).fill_(torch.nan)
    guarded = [Guarded(tensor) for tensor in (gradient, x, out)]
    kernels.values_gradient(*(buffer.tensor for buffer in guarded))
    for buffer in guarded:
        buffer.check()
    bmm.values_gradient(gradient, x, plain)
    bmm.values_gradient(gradient.double(), x.double(), exact)
    assert_as_exact_as_plain(guarded[2].tensor, plain, exact, (1, 2))


FAMILIES = ("monarch", "lowrank", "butterfly", "lowrank_butterfly", "explicit")
# Both sides of the batch from which on factors are merged, a batch of one, and an odd one.
BATCHES = (1, 7, MERGE_BATCH - 1, MERGE_BATCH, MERGE_BATCH + 1)


def random_chain(rng):
    """A chain of small factors, so that sizes fall on both sides of 16 and 64, the limits of what is merged."""
    family = rng.choice(FAMILIES)
    if family == "explicit":
        length = rng.randint(2, 4)
        rows, cols = ([rng.choice([1, 2, 3, 8]) for _ in range(length)] for _ in range(2))
        return make_chain(prod(rows), prod(cols), row_splits=rows, col_splits=cols)
    if family == "butterfly":
        halvings = rng.randint(1, 6)
        m, n = (2**halvings * rng.randint(1, 3) for _ in range(2))
        return make_chain(m, n, family, num_factors=halvings + 1)
    m, n = (rng.choice([1, 7, 12, 16, 32, 36, 64, 128]) for _ in range(2))
    return make_chain(m, n, family, blocks=rng.choice([2, 4, 8]))


def random_case(seed: int):
    """(patterns, batch, batch_last, block_order) of one draw."""
    rng = random.Random(seed)
    patterns = random_chain(rng).patterns(rng.choice([1, 2, 3, 5, 17, 100]))
    return patterns, rng.choice(BATCHES), rng.random() < 0.5, rng.random() < 0.7


def check_passes(patterns, batch, batch_last, block_order, impl="bmm", dtype=torch.float64):
    """y, with and without a backward pass to follow, and every gradient against the dense product of the factors.

    Returns:
        whether factors were merged.
    """
    values = [random_values(pattern, dtype, seed=index) for index, pattern in enumerate(patterns)]
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, patterns[-1].cols, generator=generator, dtype=dtype)
    wide = [factor.to(torch.float64, copy=True).requires_grad_() for factor in values]
    inputs = x.to(torch.float64, copy=True).requires_grad_()
    passes = ChainPasses(patterns, batch, x.device, dtype, batch_last=batch_last, block_order=block_order, impl=impl)
    expected = (inputs @ chain_to_dense(wide).t())[:, passes.output_rows]
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, [inputs, *wide], upstream)

    def laid_out(tensor):
        return tensor.t().contiguous() if batch_last else tensor

    y, *inner = passes.forward(laid_out(x), values)
    (alone,) = passes.forward(laid_out(x), values, keep=False)
    gradient = laid_out(upstream.to(dtype))
    for_x, *ours = passes.backward(gradient, laid_out(x), values, inner, needed=[True] * (1 + len(values)))
    tolerance = {"atol": 1e-10, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 1e-3, "rtol": 1e-3}
    assert torch.equal(alone, y)
    for mine, other in zip([laid_out(y) if batch_last else y, laid_out(for_x), *ours], [expected, *theirs]):
        torch.testing.assert_close(mine.double(), other, **tolerance)
    return len(passes.patterns) < len(patterns)
