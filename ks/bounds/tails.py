"""Sums of the squared singular values beyond a rank: the least losses that blocks of that rank have."""

from collections.abc import Iterator

import torch

from ks.moments.pieces import lower_gram, one_thread_each

GROUP_VALUES = 2**20  # of the blocks that a thread copies at a time: bounds the memory


@torch.no_grad()
def tail_energies(matrices: torch.Tensor) -> torch.Tensor:
    """Return Σ over a batch of matrices of the squared singular values beyond the r-th, r = 0 … min(height, width).

    They are eigenvalues of the smaller Gram matrix, in float64: the absolute error is a few times 1e-16 of the energy
    ‖·‖_F², in a third of the time of an SVD.

    Args:
        matrices: shape (..., height, width), any float dtype and strides; a large batch is not copied.
    Returns:
        float64 tensor of shape (min(height, width) + 1,), not increasing, last entry 0.
    """
    height, width = matrices.shape[-2:]
    total = torch.zeros(min(height, width), dtype=torch.float64, device=matrices.device)
    several = matrices.device.type == "cpu" and matrices.numel() > height * width
    for energies in (one_thread_each if several else map)(_group_energies, _groups(matrices)):
        total += energies
    return tail_sums(total)


def tail_sums(energies: torch.Tensor) -> torch.Tensor:
    """Return sums of all but the r largest of ascending energies of shape (..., count), r = 0 … count."""
    return torch.nn.functional.pad(energies.cumsum(-1), (1, 0)).flip(-1)


@torch.no_grad()  # a thread starts with gradients
def _group_energies(group: torch.Tensor) -> torch.Tensor:
    """Return the sums of the squared singular values over a group, ascending, shape (min(height, width),).

    Args:
        group: shape (count, height, width).
    """
    wide = group.double() if group.shape[1] <= group.shape[2] else group.double().mT
    return torch.linalg.eigvalsh(lower_gram(wide)).clamp_(min=0).sum(0)


def _groups(matrices: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield all matrices of a batch as groups of shape (count, height, width); a group of one is a view."""
    size = matrices[..., 0, 0].numel()
    if matrices.dim() > 3 and matrices.numel() > GROUP_VALUES:
        for part in matrices.split(max(1, len(matrices) * GROUP_VALUES // matrices.numel())):
            yield from _groups(part[0]) if len(part) == 1 else [part.reshape(-1, *part.shape[-2:])]
    else:
        flat = matrices.reshape(-1, *matrices.shape[-2:])
        yield from flat.split(max(1, size * GROUP_VALUES // matrices.numel()))
