"""Initial values of the right-most factor for inputs under which few directions carry the energy of the outputs."""

import torch


@torch.no_grad()
def sketch_rows(factor: torch.Tensor, weight: torch.Tensor, row_groups: int, generator: torch.Generator) -> None:
    """Give the right-most factor rows that span random combinations of the rows of W, block by block, r for each.

    The rows of a block are an orthonormal basis: with inputs of second moment I in every column group, each keeps the
    variance of its input.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), section 4.1.

    Args:
        factor: values of shape (p, r·q, n/p, 1), updated in place.
        weight: W in the coordinates of the training, shape (m, n), float64.
        row_groups: q.
        generator: on the CPU.
    """
    (p, height, width, _), q = factor.shape, row_groups
    blocks = weight.view(-1, q, p, width).permute(2, 1, 0, 3)  # (m/q q) (p n/p) -> p q (m/q) (n/p)
    noise = torch.randn(p, q, height // q, blocks.shape[2], generator=generator, dtype=weight.dtype)
    basis = torch.linalg.qr((noise.to(weight.device) @ blocks).mT)[0]  # shape: (p, q, n/p, r)
    factor.copy_(basis.permute(0, 3, 1, 2).reshape(factor.shape))  # p q (n/p) r -> p (r q) (n/p) 1
