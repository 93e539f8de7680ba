"""Floors: the least loss that any chain of a rank can have, for every rank at once.

Split l of a chain cuts W (m × n) into M_{>l}·N_{≤l} blocks B[t, i] = W[t::M_{>l}, i·N_{>l}:(i+1)·N_{>l}] of size
M_{≤l} × N_{>l}, each of rank r_l in any chain. With E_l² the sum over the blocks of the squared singular values beyond
the r_l-th,

    max_l E_l  ≤  min ‖W − K_1 … K_L‖_F  ≤  left-to-right hierarchical factorisation  ≤  √(Σ_l E_l²),

and all four are equal for two factors. A floor is a squared error per output, E² / m; for inputs of second moment σ²I,
W stands for σW.

Source: Le, Zheng, Riccietti, Gribonval, "Butterfly factorization with error guarantees" (2024).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose

import torch

from ks.bounds.factorize import HierarchicalLoss, Report, check_shape, do_not_report, tail_energies
from ks.bounds.moments import UNIT_INPUTS, IsotropicInputs
from ks.errors import UsageError
from ks.patterns import Chain


@dataclass(frozen=True)
class Floor:
    """Bounds on the least loss of the chains of one rank, in squared error per output.

    lower: no chain of that rank has a smaller loss. upper: the loss of the hierarchical factorisation. exact: the two
    are equal, so that `lower` is the optimum.
    """

    rank: int
    lower: float
    upper: float
    exact: bool


def no_floor_reason(chain: Chain) -> str | None:
    """Return why a chain family has no floor, or None if it has one."""
    if chain.family == "lowrank_butterfly":
        return "neighbours in a lowrank_butterfly are not all chainable with one rank; only its rank-r SVD bounds it"
    return None


def split_blocks(weight: torch.Tensor, chain: Chain, split: int) -> torch.Tensor:
    """Return the blocks of split l, a view of W.

    Args:
        weight: shape (m, n).
        chain: with row and column splits.
        split: l in 1 … L − 1.
    Returns:
        shape (M_{>l}, N_{≤l}, M_{≤l}, N_{>l}).
    """
    height, outer, inner, width = chain.block_shape(split)
    return weight.reshape(height, outer, inner, width).permute(1, 2, 0, 3)


@torch.no_grad()
def floor_curve(
    weight: torch.Tensor, chain: Chain, inputs: IsotropicInputs = UNIT_INPUTS, report: Report = do_not_report
) -> torch.Tensor:
    """Return the lower bound max_l E_l(r)² / m for every rank r = 0 … saturation; r = 0 is the zero predictor.

    Args:
        weight: W, shape (m, n).
        chain: with a floor (`no_floor_reason`).
        inputs: the second moment of x.
        report: told the share of the work that is done.
    Returns:
        float64 tensor of shape (saturation rank + 1,), on the CPU.
    Raises:
        UsageError: the chain has no floor, or another shape.
    """
    check_shape(weight, (chain.rows, chain.cols))
    if reason := no_floor_reason(chain):
        raise UsageError(f"no floor: {reason}")
    weight = inputs.times_root(weight)
    curve = torch.zeros(chain.saturation_rank + 1, dtype=torch.float64)
    for split in range(1, chain.num_splits + 1):
        tail = tail_energies(split_blocks(weight, chain, split), functools.partial(_part_done, report, split, chain))
        tail = tail.cpu()
        curve[: len(tail)] = torch.maximum(curve[: len(tail)], tail)
    return curve / chain.rows


def _part_done(report: Report, split: int, chain: Chain, share: float) -> None:
    report((split - 1 + share) / chain.num_splits)


def loss_floor(
    weight: torch.Tensor,
    chain: Chain,
    ranks: Sequence[int],
    curve: torch.Tensor | None = None,
    inputs: IsotropicInputs = UNIT_INPUTS,
) -> list[Floor]:
    """Return bounds on the least loss for each rank.

    Args:
        weight: W, shape (m, n), any float dtype, CPU or CUDA.
        chain: with a floor (`no_floor_reason`).
        ranks: positive integers; those above saturation have the bounds of saturation.
        curve: `floor_curve(weight, chain, inputs)`, computed if not given.
        inputs: the second moment of x.
    Returns:
        one `Floor` per rank, in the order given.
    Raises:
        UsageError: as `floor_curve`, or a rank that is not a positive integer.
    """
    curve = floor_curve(weight, chain, inputs) if curve is None else curve
    upper_of = HierarchicalLoss(inputs.times_root(weight), chain) if chain.num_splits > 1 else None
    floors = []
    for rank in ranks:
        chain.patterns(rank)  # checks the rank
        lower = curve[min(rank, chain.saturation_rank)].item()
        upper = max(lower, upper_of(rank)) if upper_of else lower
        exact = isclose(lower, upper, rel_tol=1e-6, abs_tol=1e-14 * curve[0].item())
        floors.append(Floor(rank, lower, upper, exact))
    return floors
