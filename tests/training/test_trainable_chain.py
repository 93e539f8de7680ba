"""The rows of the right-most factor that random combinations of the rows of W give."""

import torch

from ks.chain.patterns import make_chain
from ks.training.trainable_chain import sketch_rows


def test_the_rows_of_every_block_are_an_orthonormal_basis_within_the_rows_of_w():
    chain = make_chain(12, 20, row_splits=(6, 2), col_splits=(4, 5))
    (left, right), rank, q = chain.patterns(3), 3, 2
    generator = torch.Generator().manual_seed(0)
    # Blocks of rank 3, so that the basis spans their rows.
    blocks = torch.randn(q, 4, 6, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        q, 4, rank, 5, generator=generator, dtype=torch.float64
    )
    weight = blocks.permute(2, 0, 1, 3).reshape(12, 20)  # q p (m/q) (n/p) -> (m/q q) (p n/p)
    factor = torch.zeros(*right)
    sketch_rows(factor, weight, left.d, generator)
    rows = factor.double().view(4, rank, q, 5).permute(2, 0, 1, 3)
    unit = torch.eye(rank, dtype=torch.float64).expand(q, 4, rank, rank)
    torch.testing.assert_close(rows @ rows.mT, unit, atol=1e-6, rtol=0)
    torch.testing.assert_close(blocks @ rows.mT @ rows, blocks, atol=1e-5, rtol=0)
