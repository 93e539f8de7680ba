"""Count what the host does in an epoch of training steps, by torch's profiler: launches, replays, waits, copies.

    python benchmarks/synchronisations.py --device cuda --csv synchronisations.csv

A captured epoch should show one cudaGraphLaunch per step, and no wait or copy to the host except at its end, where the
host reads the epoch's losses.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from bench_step import STEPS, our_epoch
from timing import Rows, named_device, place

from ks.cli import console
from ks.layer import KSLinear
from ks.training.samples import Samples

TELLING = ("Synchronize", "Memcpy", "GraphLaunch", "LaunchKernel", "_local_scalar_dense")


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 4096), help="m and n (default: 2048 4096)")
    parser.add_argument("--rank", type=int, default=16, help="(default: 16)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    (m, n), device, rows = options.shape, named_device(options.device), Rows(options.csv)
    weight = torch.randn(m, n, device=device) * n**-0.5
    layer = KSLinear(n, m, options.rank, device=device)
    samples = Samples(weight, STEPS * 32, 1, 32, sampling="fixed", seed=0)
    epoch = our_epoch(layer, weight, samples, "auto")
    epoch()
    with torch.profiler.profile() as profiler:
        epoch()
    counted = Counter(event.name for event in profiler.events())
    for name, count in counted.most_common():
        if any(part in name for part in TELLING):
            rows.add({"steps": STEPS, "event": name, "count": count} | place(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
