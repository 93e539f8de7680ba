"""What every kernel is tried on, and the rule by which it passes: shared by the interpreter's tests and the GPU's."""

import torch

from ks import batched, tiles
from ks.patterns import Pattern, chainability, make_chain

# Odd, prime and ragged sizes; a = 1, d = 1, both larger; d = 2, 4, 8 (grouped t) and 3, 6 (not all of them).
PATTERNS = [
    Pattern(1, 24, 40, 4),
    Pattern(3, 20, 17, 1),
    Pattern(2, 5, 7, 6),
    Pattern(2, 2, 3, 2),
    Pattern(1, 33, 12, 8),
    Pattern(2, 19, 1, 3),
]
CHAINS = [
    make_chain(24, 36).patterns(3),
    make_chain(32, 16).patterns(17),
    make_chain(8, 12, "monarch", blocks=2).patterns(2),
]


def random_values(pattern, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*pattern, generator=generator) * pattern.c**-0.5
    return batched.empty_values(pattern, device, dtype).copy_(values)


def random_matrix(features, batch, dtype, contiguous_batch, device="cpu", seed=1):
    """(features, batch), contiguous in the batch or in the features."""
    matrix = torch.randn(features, batch, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return matrix if contiguous_batch else matrix.t().contiguous().t()


def poisoned_matrix(features, batch, dtype, contiguous_batch, device="cpu"):
    matrix = torch.full((features, batch) if contiguous_batch else (batch, features), torch.nan, dtype=dtype)
    return (matrix if contiguous_batch else matrix.t()).to(device)


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


def check_factor(
    kernels, pattern, dtype, x_layout, out_layout, batch=20, block_order=False, transposed=False, device="cpu"
):
    """y = K x, or Kᵀ x; block order is that of the b side."""
    values = random_values(pattern, dtype, device)
    factor = values.transpose(1, 2) if transposed else values
    a, b, c, d = factor.shape
    x = random_matrix(a * c * d, batch, dtype, x_layout, device)
    out = poisoned_matrix(a * b * d, batch, dtype, out_layout, device)
    order = {"x_block_order" if transposed else "out_block_order": block_order}
    kernels.apply_factor(factor, x, out, **order)
    plain, exact = torch.empty_like(out), torch.empty_like(out, dtype=torch.float64)
    batched.apply_factor(factor, x, plain, **order)
    batched.apply_factor(factor.double(), x.double(), exact, **order)
    shape = (a, d, b, batch) if block_order and not transposed else (a, b, d, batch)
    dims = (2, 3) if block_order and not transposed else (1, 3)
    assert_as_exact_as_plain(*(y.reshape(shape) for y in (out, plain, exact)), dims)


def check_values_gradient(kernels, pattern, dtype, g_layout, x_layout, batch=20, block_order=False, device="cpu"):
    gradient = random_matrix(pattern.rows, batch, dtype, g_layout, device)
    x = random_matrix(pattern.cols, batch, dtype, x_layout, device, seed=2)
    results = [batched.empty_values(pattern, device, kind).fill_(torch.nan) for kind in (dtype, dtype, torch.float64)]
    kernels.values_gradient(gradient, x, results[0], block_order=block_order)
    batched.values_gradient(gradient, x, results[1], block_order=block_order)
    batched.values_gradient(gradient.double(), x.double(), results[2], block_order=block_order)
    assert_as_exact_as_plain(*results, (1, 2))


def check_pair(
    kernels, patterns, dtype, layout, batch=20, keep=True, block_order=False, transposed=False, device="cpu"
):
    left, right = (random_values(pattern, dtype, device, seed) for seed, pattern in enumerate(patterns))
    rank = chainability(*patterns)
    tile = tiles.Tiles(16, 16, 16, rank=tiles._power_of_two(rank, 16, 64))
    rows, cols = (patterns[1].cols, patterns[0].rows) if transposed else (patterns[0].rows, patterns[1].cols)
    x = random_matrix(cols, batch, dtype, layout, device)
    out = poisoned_matrix(rows, batch, dtype, layout, device)
    inner = poisoned_matrix(patterns[1].rows, batch, dtype, True, device) if keep else None
    kernels.apply_pair(left, right, x, out, inner, tile, transposed=transposed, block_order=block_order)

    def unfused(kind):
        factors = [left.transpose(1, 2), right.transpose(1, 2)] if transposed else [right, left]
        between = torch.empty(patterns[1].rows, batch, dtype=kind, device=device)
        result = torch.empty(rows, batch, dtype=kind, device=device)
        x_order = {"x_block_order": block_order and transposed}
        batched.apply_factor(factors[0].to(kind), x.to(kind), between, **x_order)
        batched.apply_factor(factors[1].to(kind), between, result, out_block_order=block_order and not transposed)
        return result, between

    plain, exact = unfused(dtype), unfused(torch.float64)
    assert_as_exact_as_plain(*(y.reshape(-1, 4, batch) for y in (out, plain[0], exact[0])), (1, 2))
    if keep:
        assert_as_exact_as_plain(*(z.unsqueeze(0) for z in (inner, plain[1], exact[1])), (1, 2))
