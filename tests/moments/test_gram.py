"""Lower triangles of Gram matrices."""

import pytest
import torch

from ks.moments import pieces
from ks.moments.gram import lower_gram


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("shape", [(7, 4), (3, 7, 10), (2, 3, 7, 10)])
def test_the_lower_triangle_is_that_of_the_product(shape, piece, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", piece)
    matrix = torch.randn(shape, dtype=torch.float64)
    for a in (matrix, matrix.mT.contiguous().mT):
        found = lower_gram(a)
        torch.testing.assert_close(found.tril(), (a @ a.mT).tril())
        assert found.isfinite().all()
