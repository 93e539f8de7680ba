"""Train one rank as most scripts do, for comparison (`baselines.plain_epochs`); bench_sweep.py runs this program."""

import argparse
import sys

import torch
from baselines import PlainChain, plain_epochs

from ks.layer import KSLinear


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weight_path", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--num_epochs", type=int, required=True)
    parser.add_argument("--num_samples", type=int, required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    weight = torch.load(options.weight_path, weights_only=True).float().to(options.device)
    rows, cols = weight.shape
    model = PlainChain(KSLinear(cols, rows, options.rank).factors).to(options.device)
    inputs = torch.randn(round(options.num_samples * 0.8), cols, device=options.device)
    losses = plain_epochs(model, weight, inputs, options.num_epochs, options.batch_size)
    print(f"rank {options.rank}: loss {losses[-1]:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
