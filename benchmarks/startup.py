"""Measure what a sweep and its runs take before and after their training, against `python -c "import torch"`.

    python benchmarks/startup.py
    python benchmarks/startup.py --checkout ../another_revision

At default settings on a 1024 × 2048 weight, with four ranks of one epoch, one after the other: the time until the first
run has started, and the time of a run besides its epochs. It is measured with runs as forks (the default), with fresh
interpreters (`python -B`), and for another checkout of this repository; medians of rounds in which these take turns.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from timing import seconds

from ks.files.curves import read_curves
from ks.files.layout import run_files

ROOT = Path(__file__).resolve().parent.parent
RANKS = (4, 8, 16, 32)


def sweep(script: Path, weight: Path, options: list[str]) -> tuple[float, float]:
    """Return the seconds until the first run has started, and the median of a run besides its epochs."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--weight_path",
            weight,
            "--output_dir",
            folder,
            "--num_epochs",
            1,
            "--latency_seconds",
            0,
            "--jobs",
            1,
        ]
        command = [sys.executable, *options, script, *flags, "--ranks", *RANKS]
        began, times = time.perf_counter(), {}
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*map(str, command)], **streams) as run:
            for line in run.stderr:
                words = line.split()
                if words[:1] == ["rank"] and words[2] in ("training", "ok,"):
                    times[int(words[1].rstrip(":")), words[2]] = time.perf_counter() - began
        trained = {rank: read_curves(run_files(Path(folder), rank, None, None).curves_csv) for rank in RANKS}
    rest = [
        times[rank, "ok,"] - times[rank, "training"] - sum(row["epoch_seconds"] for row in trained[rank])
        for rank in RANKS[:-1]  # the largest one is the first, and waits for the samples
    ]
    return min(times.values()), median(rest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="another checkout of this repository, to compare")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    options = parser.parse_args()
    ways = {"forks": (ROOT, []), "fresh interpreters": (ROOT, ["-B"])}
    if options.checkout:
        ways[str(options.checkout)] = (options.checkout, [])
    with tempfile.TemporaryDirectory() as folder:
        weight = Path(folder) / "weight.pth"
        shape = ("--output_features", 1024, "--input_features", 2048)
        seconds(ROOT / "generate_test_weight.py", *shape, "--output_path", weight)
        torch, found = [], {way: [] for way in ways}
        for _ in range(options.rounds):
            torch.append(seconds("-c", "import torch"))
            for way, (root, flags) in ways.items():
                found[way].append(sweep(root / "rank_sweep_study.py", weight, flags))
    print(f"import torch: {median(torch):.2f} s")
    for way, pairs in found.items():
        first, rest = (median(column) for column in zip(*pairs))
        print(f"{way}: the first run starts after {first:.2f} s; a run takes {rest:.2f} s besides its epochs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
