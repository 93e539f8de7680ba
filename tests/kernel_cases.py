"""What every kernel is tried on, and the rule by which it passes: shared by the interpreter's tests and the GPU's."""

import torch

from ks.batched import empty_values
from ks.patterns import Pattern, make_chain

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
    return empty_values(pattern, device, dtype).copy_(values)


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
