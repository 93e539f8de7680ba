"""Products for the Triton kernel, random chains, and the rules by which they pass, for the interpreter and the GPU."""

import random
from math import prod

import torch

from ks.chain import bmm
from ks.chain.passes import ChainPasses
from ks.chain.patterns import make_chain
from ks.chain.reference import chain_to_dense

# (a, d, m, k, n): odd, prime and ragged sizes, one and several tiles of each, single rows and columns.
SIZES = [(1, 4, 24, 40, 20), (3, 2, 70, 17, 33), (2, 1, 5, 7, 1), (1, 3, 65, 1, 40), (2, 2, 7, 150, 3)]
# The dimensions of each operand in the order of memory: of a batch in front, of a batch behind, of stored values.
ORDERS = [(3, 0, 2, 1), (0, 2, 1, 3), (0, 1, 2, 3)]
CASES = [(sizes, ORDERS[index:] + ORDERS[:index]) for index, sizes in enumerate(SIZES * 3)]
# What a GPU tries besides: the gradient of the left factor of README's study, and its product.
STUDY_CASES = [((1, 4, 512, 1000, 64), ORDERS), ((1, 4, 512, 64, 1000), ORDERS)]


def random_values(pattern, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return bmm.empty_values(pattern, dtype=dtype).copy_(torch.randn(*pattern, generator=generator) * pattern.c**-0.5)


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


def check_multiply(multiply, case, dtype, device="cpu", out_dtype=None):
    """out = left @ right for one of the CASES, amid NaN, and then the product added to it."""
    (a, d, m, k, n), orders = case
    generator = torch.Generator().manual_seed(0)
    guarded = []
    for shape, order in zip(((a, d, m, k), (a, d, k, n), (a, d, m, n)), orders):
        stored = torch.randn([shape[dim] for dim in order], generator=generator)
        operand = stored.permute(*(order.index(dim) for dim in range(4)))
        guarded.append(Guarded(operand.to(device, (out_dtype or dtype) if len(guarded) == 2 else dtype)))
    left, right, out = (buffer.tensor for buffer in guarded)
    multiply(left, right, out.fill_(torch.nan))
    for buffer in guarded:
        buffer.check()
    assert_as_exact_as_plain(out, left @ right, left.double() @ right.double(), (2, 3))
    product = out.clone()
    multiply(left, right, out, True)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, 2 * product, rtol=tolerance, atol=tolerance * product.abs().max().item())
    for buffer in guarded:
        buffer.check()


FAMILIES = ("monarch", "lowrank", "butterfly", "lowrank_butterfly", "explicit")


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


def check_passes(seed, impl="bmm", dtype=torch.float64):
    """y and every gradient of a random chain against the dense product of its factors, in the order `output_rows`."""
    rng = random.Random(seed)
    patterns = random_chain(rng).patterns(rng.choice([1, 2, 3, 5, 17, 100]))
    batch, batch_last, block_order = rng.choice([1, 7, 33]), rng.random() < 0.5, rng.random() < 0.7
    values = [random_values(pattern, dtype, seed=index) for index, pattern in enumerate(patterns)]
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, patterns[-1].cols, generator=generator, dtype=dtype)
    wide = [factor.to(torch.float64, copy=True).requires_grad_() for factor in values]
    inputs = x.to(torch.float64, copy=True).requires_grad_()
    passes = ChainPasses(patterns, batch_last=batch_last, block_order=block_order, impl=impl)
    expected = (inputs @ chain_to_dense(wide).t())[:, passes.output_rows]
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, [inputs, *wide], upstream)

    def laid_out(tensor):
        return tensor.t().contiguous() if batch_last else tensor

    y, *inner = passes.forward(laid_out(x), values)
    for_x, *ours = passes.backward(laid_out(upstream.to(dtype)), laid_out(x), values, inner, for_x=True)
    tolerance = {"atol": 1e-10, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 1e-3, "rtol": 1e-3}
    for mine, other in zip([laid_out(y) if batch_last else y, laid_out(for_x), *ours], [expected, *theirs]):
        torch.testing.assert_close(mine.double(), other, **tolerance)
