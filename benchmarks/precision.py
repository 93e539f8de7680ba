"""Train in float32, float16 and bfloat16: gap to the floor, time and memory of every rank.

    python benchmarks/precision.py --device cuda --csv precision.csv

The sweeps train a 2048 × 4096 weight at default settings for 20 epochs. `resident_mib` is what a training must hold:
inputs and targets of all samples in the training dtype, the weight in float64, values, their gradients and two moments
in float32.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from timing import Rows, place, seconds

from ks.cli import console
from ks.files.atomic import read_json, read_json_object
from ks.files.layout import run_files
from ks.files.weights import DTYPES
from ks.training.problem import choose_device

ROOT = Path(__file__).resolve().parent.parent


def resident_mib(m: int, n: int, num_samples: int, parameters: int, itemsize: int) -> float:
    return (num_samples * (m + n) * itemsize + 8 * m * n + 16 * parameters) / 2**20


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 4096), help="m and n (default: 2048 4096)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 256], help="(default: 4 16 64 256)")
    parser.add_argument("--num_epochs", type=int, default=20, help="(default: 20)")
    parser.add_argument("--num_samples", type=int, default=10000, help="(default: 10000)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    (m, n), device, rows = options.shape, choose_device(options.device), Rows(options.csv)
    with tempfile.TemporaryDirectory() as folder:
        weight = Path(folder) / "weight.pth"
        seconds(
            ROOT / "generate_test_weight.py", "--output_features", m, "--input_features", n, "--output_path", weight
        )
        for dtype in DTYPES:
            output = Path(folder) / dtype
            size = ("--num_epochs", options.num_epochs, "--num_samples", options.num_samples, "--jobs", 1)
            flags = ("--dtype", dtype, "--device", options.device, "--output_dir", output, "--ranks", *options.ranks)
            seconds(ROOT / "rank_sweep_study.py", "--weight_path", weight, *size, *flags)
            for rank in read_json(output / "rank_sweep_summary.json"):
                config = read_json_object(run_files(output, rank["rank"], None, None).config)
                itemsize = DTYPES[dtype].itemsize
                row = {"dtype": dtype, "rank": rank["rank"], "gap": rank["optimality_gap"], "excess": rank["excess"]}
                row |= {"train_seconds": rank["train_seconds"], "peak_gpu_mib": config.get("peak_gpu_mib", "")}
                row |= {"resident_mib": resident_mib(m, n, options.num_samples, rank["parameters"], itemsize)}
                rows.add(row | place(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
