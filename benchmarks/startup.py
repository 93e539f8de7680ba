"""Measure the time from `python train_with_random.py` to its first step, against `python -c "import torch"`.

    python benchmarks/startup.py

The trainer runs at default settings on a 1024 × 2048 weight: it draws and whitens 8,000 samples and computes their
targets first.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

from timing import seconds

ROOT = Path(__file__).resolve().parent.parent
TO_THE_FIRST_STEP = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import ks.training.samples
def stop(self, *_):
    os._exit(0)
ks.training.samples.Samples.epoch = stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        weight = Path(folder) / "weight.pth"
        shape = ("--output_features", 1024, "--input_features", 2048)
        seconds(ROOT / "generate_test_weight.py", *shape, "--output_path", weight)
        trainer = (ROOT / "train_with_random.py", "--weight_path", weight, "--output_dir", folder)
        found = {"import torch": [], "default samples": [], "80 samples": []}
        for _ in range(7):
            found["import torch"].append(seconds("-c", "import torch"))
            found["default samples"].append(seconds("-c", TO_THE_FIRST_STEP, *trainer))
            found["80 samples"].append(seconds("-c", TO_THE_FIRST_STEP, *trainer, "--num_samples", 80))
    times = {name: median(values) for name, values in found.items()}
    for name, value in times.items():
        print(f"{name}: {value:.2f} s, {value / times['import torch']:.2f} × import torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
