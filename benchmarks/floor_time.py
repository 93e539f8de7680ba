"""Time the exact floors of a weight, by chain and size: what a sweep spends before its first training.

    python benchmarks/floor_time.py
    python benchmarks/floor_time.py --sizes 1024 2048

The program prints a Markdown table in seconds, from one run each on all threads.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ks
from ks.bounds.rank_floors import RankFloors
from ks.files.make_weight import make_weight

RANKS = [2, 4, 8, 16, 32, 64, 128, 256, 512]


def measure(size: int, family: str) -> list[float]:
    """Return seconds for: floor of every rank, bounds of `RANKS`, smallest rank for 0.1, low-rank reference."""
    weight = make_weight(size, size, "xavier_uniform")
    weight *= size**0.5 / weight.norm()
    floors = RankFloors(weight, ks.make_chain(size, size, family))
    times = [time.perf_counter()]
    works: tuple[Callable[[], object], ...] = (
        lambda: floors.curve,
        lambda: floors.floors(RANKS),
        lambda: floors.target_ranks(0.1),
        floors.family_curves,
    )
    for work in works:
        work()
        times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="sides of square weights")
    options = parser.parse_args(argv)
    measure(256, "butterfly")  # warm-up
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| size | chain | floor of every rank | bounds of nine ranks | smallest rank for 0.1 | low-rank reference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        for family in ("monarch", "butterfly", "lowrank"):
            cells = " | ".join(f"{value:.1f}" for value in measure(size, family))
            print(f"| {size} × {size} | {family} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
