"""Train a rank on the CPU and on a GPU, and compare the losses: the first thing to see of a new card.

    python benchmarks/first_run.py --device cuda --csv run.csv
    python benchmarks/first_run.py --device cuda --uncapturable

Both runs draw the same samples, so that their losses differ by rounding alone. With --uncapturable the criterion reads
the device, as an edited one may, which no CUDA graph can hold: the run must say so, go on step by step and measure its
latency at the end all the same. Exit code: 1 if the losses or the way of the steps are not as expected, else 0.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import Rows, place

from ks.cli import console

ROOT = Path(__file__).resolve().parent.parent
CLOSE = 1e-2  # of the loss after three epochs
OURS = "criterion = mean_squared_error  # edit here"
READS_THE_DEVICE = """def criterion(prediction, target):
    loss = mean_squared_error(prediction, target)
    return loss if loss.item() >= 0 else -loss
"""


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--uncapturable", action="store_true", help="train by a criterion that reads the device")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the program itself")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    (m, n), samples = ((16, 24), 400) if options.tiny else ((1024, 2048), 10000)
    rows, losses, steps = Rows(options.csv), [], ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = (ROOT / "train_with_random.py").read_text()
        assert OURS in source
        script = folder / "train_with_random.py"
        script.write_text(source.replace(OURS, READS_THE_DEVICE) if options.uncapturable else source)
        weight = folder / "weight.pth"
        torch.save(torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * n**-0.5, weight)
        for device in ("cpu", options.device):
            output = folder / f"out_{len(losses)}"
            flags = ["--num_epochs", 3, "--num_samples", samples, "--device", device, "--output_dir", output]
            command = [sys.executable, script, "--weight_path", weight, *flags]
            subprocess.run([*map(str, command)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            losses += json.loads((output / "ks_chain_rank_4_loss_curves.json").read_text())["val_losses"][-1:]
            steps = json.loads((output / "ks_chain_config.json").read_text())["steps"]["name"]
            log = json.loads((output / "ks_chain_training_log.json").read_text())
            found = {"val_loss": losses[-1], "train_seconds": log["train_seconds"], "steps": steps}
            found |= {"latency": log["latency"]["launched"]}
            rows.add({"device": device} | found | place(torch.device(device)))
    captured = options.device.startswith("cuda") and not options.uncapturable
    as_expected = steps.startswith("captured" if captured else "one by one")
    return 0 if as_expected and abs(losses[1] - losses[0]) <= CLOSE * losses[0] else 1


if __name__ == "__main__":
    sys.exit(main())
