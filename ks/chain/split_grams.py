"""Gram matrices PᵀP and SSᵀ of the prefix and suffix at every split, and how they precondition gradients.

A chainable chain cut between K_l and K_{l+1} is a prefix P = K_1 ⋯ K_l and a suffix S = K_{l+1} ⋯ K_L. Between them are
a_{l+1}·d_l groups of r_l features, r_l being the chainability number. Within a group, PᵀP and S Sᵀ are r_l × r_l
matrices that follow from the factors alone, split after split. One matrix per group is itself a factor: its values have
the shape (a_{l+1}, r_l, r_l, d_l).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from ks.chain.merge import merge_factors
from ks.chain.patterns import Pattern, chainability


class SplitMatrices(NamedTuple):
    """Symmetric matrices that multiply the gradient of every factor from its left and from its right.

    `left` and `right` have one tensor per split, of shape (a_{l+1}, r_l, r_l, d_l): factor l is multiplied by the left
    one of split l − 1 and by the right one of split l. They may also couple all groups of a block: a left one then has
    the shape (a_l, b_l, b_l, d_l), a right one (a_l, c_l, c_l, d_l).
    """

    left: list[torch.Tensor]
    right: list[torch.Tensor]

    def beside(self, factor: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the matrices for a factor, counted from 0; None where the chain ends."""
        left = self.left[factor - 1] if factor > 0 else None
        right = self.right[factor] if factor < len(self.right) else None
        return left, right


def is_chainable(patterns: Sequence[Pattern]) -> bool:
    """Return whether all neighbours of a chain are chainable, so that its splits have such matrices."""
    return all(chainability(left, right) is not None for left, right in pairwise(patterns))


def split_patterns(patterns: Sequence[Pattern]) -> list[Pattern]:
    """Return the patterns (a_{l+1}, r_l, r_l, d_l) of the matrices at the splits of a chainable chain."""
    found = []
    for left, right in pairwise(patterns):
        rank = chainability(left, right)
        assert rank is not None
        found.append(Pattern(right.a, rank, rank, left.d))
    return found


def prefix_grams(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the diagonal blocks of PᵀP at every split.

    With rows j = (s, w) and columns k = (u, ρ) of a block V of K_l, s and ρ in the groups of the splits l − 1 and l:
    G_l[(i, u), t] = Σ_w V[:, w, u, :]ᵀ G_{l-1}[i, (w, t)] V[:, w, u, :] with V = v[i, :, :, t].

    Args:
        values: of the factors, shapes (a_l, b_l, c_l, d_l), output side first.
    Returns:
        one tensor of shape (a_{l+1}, r_l, r_l, d_l) per split.
    """
    grams: list[torch.Tensor] = []
    for left, right in pairwise(values):
        a, _, _, d = left.shape
        blocks = _split_blocks(left, grams[-1].shape[3] // d if grams else 1, right.shape[0] // a)
        if grams:
            blocks = blocks.permute(0, 3, 2, 1, 4)  # a·d s w u ρ -> a·d u w s ρ
            weighted = _before(grams[-1], d).unsqueeze(1) @ blocks
            gram = _products(blocks.flatten(2, 3).mT, weighted.flatten(2, 3))
        else:
            blocks = blocks.squeeze(2).transpose(1, 2)  # a·d s 1 u ρ -> a·d u s ρ
            gram = _products(blocks.mT, blocks)
        gram = gram.unflatten(0, (a, d)).transpose(1, 2)  # a·d u ρ ρ -> a u d ρ ρ
        grams.append(gram.flatten(0, 1).permute(0, 2, 3, 1))
    return grams


def suffix_grams(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the diagonal blocks of S Sᵀ at every split: the second moment there for inputs of second moment I.

    In the notation of `prefix_grams`: G_{l-1}[i, (w, t)] = Σ_u V[:, w, u, :] G_l[(i, u), t] V[:, w, u, :]ᵀ.

    Args:
        values: of the factors, shapes (a_l, b_l, c_l, d_l), output side first.
    Returns:
        one tensor of shape (a_{l+1}, r_l, r_l, d_l) per split.
    """
    grams: list[torch.Tensor] = []
    for left, right in reversed(list(pairwise(values))):
        a, _, _, d = right.shape
        blocks = _split_blocks(right, left.shape[3] // d, grams[0].shape[0] // a if grams else 1)
        if grams:
            blocks = blocks.permute(0, 2, 3, 4, 1)  # a·d s w u ρ -> a·d w u ρ s
            weighted = _behind(grams[0], a).unsqueeze(1) @ blocks
            gram = _products(blocks.flatten(2, 3).mT, weighted.flatten(2, 3))
        else:
            blocks = blocks.squeeze(3).transpose(1, 2)  # a·d s w 1 ρ -> a·d w s ρ
            gram = _products(blocks, blocks.mT)
        gram = gram.unflatten(0, (a, d)).transpose(1, 2)  # a·d w s s -> a w d s s
        grams.insert(0, gram.flatten(1, 2).permute(0, 2, 3, 1))
    return grams


def coupled_moments(values: Sequence[torch.Tensor], moment: torch.Tensor) -> list[torch.Tensor]:
    """Return, for every factor except the right-most, the second moment of the features that enter each of its blocks:
    blocks of S C Sᵀ, for inputs of second moment C.

    Args:
        values: of the factors, shapes (a_l, b_l, c_l, d_l), output side first.
        moment: C, shape (n, n).
    Returns:
        one tensor of shape (a_l, c_l, c_l, d_l) per split, in about r q n² / a multiply-adds, with q = d_l.
    """
    moments: list[torch.Tensor] = []
    suffix = values[-1]
    for factor in values[-2::-1]:
        a, _, c, d = factor.shape
        groups, _, width, _ = suffix.shape
        u = groups // a
        rows = suffix.reshape(a, u, -1, d, width)  # (a u) (ρ t) k -> a u ρ t k
        within = moment.view(a, len(moment) // a, a, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        mixed = torch.einsum("aurtk,aukvj->aurtvj", rows, within.reshape(a, u, width, u, width))
        moments.insert(0, torch.einsum("aurtvj,avstj->aurvst", mixed, rows).reshape(a, c, c, d))
        suffix = merge_factors(factor, suffix)
    return moments


def coupled_grams(values: Sequence[torch.Tensor], metric: torch.Tensor) -> list[torch.Tensor]:
    """Return, for every factor except the left-most, the metric of the features that leave each of its blocks:
    blocks of Pᵀ G P, for outputs of metric G. It mirrors `coupled_moments`.

    Args:
        values: of the factors, shapes (a_l, b_l, c_l, d_l), output side first.
        metric: G, shape (m, m).
    Returns:
        one tensor of shape (a_l, b_l, b_l, d_l) per split, in about r p m² / d multiply-adds, with p = a_l.
    """
    grams: list[torch.Tensor] = []
    prefix = values[0]
    for factor in values[1:]:
        a, b, _, d = factor.shape
        _, height, _, groups = prefix.shape
        w = groups // d
        columns = prefix.reshape(height, a, -1, w, d)  # h (a ρ) (w t) -> h a ρ w t
        within = metric.view(height, w, d, height, w, d).diagonal(dim1=2, dim2=5)
        mixed = torch.einsum("harwt,hwjvt->arwjvt", columns, within)
        grams.append(torch.einsum("arwjvt,jasvt->arwsvt", mixed, columns).reshape(a, b, b, d))
        prefix = merge_factors(prefix, factor)
    return grams


def scale_gradient(
    gradient: torch.Tensor, left: torch.Tensor | None = None, right: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the gradient of a factor with every block multiplied from the left and from the right.

    Args:
        gradient: shape (a, b, c, d).
        left, right: as `SplitMatrices.beside` returns them.
    """
    a, b, c, d = gradient.shape
    inner = left.shape[3] // d if left is not None else 1
    outer = right.shape[0] // a if right is not None else 1
    blocks = _split_blocks(gradient, inner, outer)
    if left is not None:
        blocks = torch.einsum("gwsz,gzwur->gswur", _before(left, d), blocks)
    if right is not None:
        blocks = torch.einsum("gswuz,guzr->gswur", blocks, _behind(right, a))
    return blocks.reshape(a, d, b, c).permute(0, 2, 3, 1)


def _split_blocks(values: torch.Tensor, inner: int, outer: int) -> torch.Tensor:
    """Return values of shape (a, b, c, d) as (a·d, s, w, u, ρ), with w < inner and u < outer."""
    return values.permute(0, 3, 1, 2).flatten(0, 1).unflatten(2, (outer, -1)).unflatten(1, (-1, inner))


def _before(matrices: torch.Tensor, d: int) -> torch.Tensor:
    """Return the matrices of the split before a factor, shape (a, r, r, w·d), as (a·d, w, r, r)."""
    return matrices.permute(0, 3, 1, 2).unflatten(1, (-1, d)).transpose(1, 2).flatten(0, 1)


def _behind(matrices: torch.Tensor, a: int) -> torch.Tensor:
    """Return the matrices of the split behind a factor, shape (a·u, r, r, d), as (a·d, u, r, r)."""
    return matrices.permute(0, 3, 1, 2).unflatten(0, (a, -1)).transpose(1, 2).flatten(0, 1)


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right for two dimensions of batches; torch.matmul would copy operands that do not fold into one.

    Args:
        left: shape (g, h, x, y).
        right: shape (g, h, y, z).
    """
    out = left.new_empty(*left.shape[:3], right.shape[3])
    dim = 0 if len(left) <= left.shape[1] else 1
    for factors in zip(left.unbind(dim), right.unbind(dim), out.unbind(dim)):
        torch.bmm(factors[0], factors[1], out=factors[2])
    return out
