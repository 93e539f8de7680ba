"""Wall time of the demo's sweep against the plain loop run rank after rank.

    python benchmarks/bench_sweep.py --csv sweep.csv
    python benchmarks/bench_sweep.py --num_epochs 1 --rounds 3 --jobs 1 2

Both train ranks 2 … 64 of the demo's 1024 × 2048 weight on the same number of samples and epochs, each rank in a
process of its own. Ours also computes floors, validates, saves and draws; the plain loop only trains. One epoch only
(`--num_epochs 1`) is nearly all overhead: its seconds over the number of ranks are what a rank costs besides its steps.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from timing import Rows, place, seconds

ROOT = Path(__file__).resolve().parent.parent
RANKS = ["2", "4", "8", "16", "32", "64"]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_epochs", type=int, default=20, help="(default: 20, as the demo)")
    parser.add_argument("--num_samples", type=int, default=5000, help="(default: 5000, as the demo)")
    parser.add_argument("--rounds", type=int, default=1, help="interleaved repetitions (default: 1)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--jobs", nargs="+", default=["auto"], help="ours, with each of these (default: auto)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    size = ("--num_epochs", options.num_epochs, "--num_samples", options.num_samples, "--device", options.device)
    found = {"plain": []} | {f"jobs_{jobs}": [] for jobs in options.jobs}
    with tempfile.TemporaryDirectory() as folder:
        weight = Path(folder) / "weight.pth"
        shape = ("--output_features", 1024, "--input_features", 2048, "--init_method", "power_law")
        seconds(ROOT / "generate_test_weight.py", *shape, "--output_path", weight)
        for number in range(options.rounds):
            plain = (ROOT / "benchmarks" / "plain_train.py", "--weight_path", weight, *size)
            found["plain"].append(sum(seconds(*plain, "--rank", rank) for rank in RANKS))
            sweep = (ROOT / "rank_sweep_study.py", "--weight_path", weight, "--ranks", *RANKS, *size, "--quiet")
            for jobs in options.jobs:
                output = ("--output_dir", Path(folder) / f"{number}_{jobs}")
                found[f"jobs_{jobs}"].append(seconds(*sweep, "--jobs", jobs, *output))
    times = {name: median(values) for name, values in found.items()}
    row = {"num_epochs": options.num_epochs, "num_samples": options.num_samples, "device": options.device}
    row |= {f"{name}_seconds": value for name, value in times.items()}
    row |= {f"plain_over_{name}": times["plain"] / value for name, value in times.items() if name != "plain"}
    Rows(options.csv).add(row | place(torch.device(options.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
