"""Train a default rank on the CPU and on a GPU, and compare the losses: the first thing to see of a new card.

    python benchmarks/first_training.py --device cuda --csv training.csv

Both draw the same samples, so that the losses differ by rounding alone. Exit code: 1 if they do not agree, else 0.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from timing import Rows, place, seconds

from ks.cli import console

ROOT = Path(__file__).resolve().parent.parent
CLOSE = 1e-2  # of the loss after three epochs


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the program itself")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    (m, n), samples = ((16, 24), 400) if options.tiny else ((1024, 2048), 10000)
    rows, losses = Rows(options.csv), []
    with tempfile.TemporaryDirectory() as folder:
        weight = Path(folder) / "weight.pth"
        torch.save(torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * n**-0.5, weight)
        for device in ("cpu", options.device):
            output = Path(folder) / f"out_{len(losses)}"
            flags = ("--num_epochs", 3, "--num_samples", samples, "--device", device, "--output_dir", output)
            wall = seconds(ROOT / "train_with_random.py", "--weight_path", weight, *flags)
            losses += json.loads((output / "ks_chain_rank_4_loss_curves.json").read_text())["val_losses"][-1:]
            where = place(torch.device(device))
            rows.add({"device": device, "val_loss": losses[-1], "wall_seconds": wall} | where)
    return 0 if abs(losses[1] - losses[0]) <= CLOSE * losses[0] else 1


if __name__ == "__main__":
    sys.exit(main())
