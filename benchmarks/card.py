"""Measure everything on a GPU, unattended: a run, tests, the layer, the step, sweeps.

    make gpu                                                                # on a GPU: results in build/gpu
    python benchmarks/card.py --output_dir build/gpu --minutes 9            # in pieces: the same command resumes
    python benchmarks/card.py --output_dir build/try --device cpu --tiny    # to try the program itself without a GPU

Each step writes STEP.csv and STEP.log; steps.json says how each ended, and OUTPUT_DIR.tar.gz has all of it after each.
A failed step does not stop the others, and a rerun skips the steps that ended well at this revision. Exit code: 1 if a
step failed or ran out of time, else 0.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from timing import place

from ks.cli import console
from ks.files.atomic import prepare_output_dir, read_json_object, write_json

FOLDER = Path(__file__).resolve().parent
SMALL = "--shape 64 128 --ranks 2 4 --num_epochs 2 --num_samples 400"
MANUAL = "--shape 2048 4096 --ranks 2 4 8 16 32 64 128 256 512 --num_epochs 100 --num_samples 10000"
STEP, FEW = "--shape 2048 4096 --ranks 16 64 --rounds 7", "--shape 64 128 --ranks 2 --rounds 2"
# Step, its program, its arguments, and those for --tiny; the most telling steps come first, and those before "demo" are
# to fit into ten minutes. All but the runs and the sweeps need torch, numpy and pytest alone.
BEFORE_TESTS = (
    ("run", "first_run", "", "--tiny"),
    ("uncapturable", "first_run", "--uncapturable", "--uncapturable --tiny"),
)
MEASUREMENTS = (
    ("layer", "bench_layer", "--dtypes bfloat16 float32 --compiled", "--batches 1 --rounds 1"),
    ("step", "bench_step", STEP, FEW),
    ("demo", "bench_sweep", "", SMALL),
    ("manual", "bench_sweep", MANUAL, SMALL),
)


def steps(folder: Path, device: str, tiny: bool) -> dict[str, list[str]]:
    """Return the arguments of Python for each step."""

    def measurement(name, program, real, small):
        flags = (small if tiny else real).split()
        return [str(FOLDER / f"{program}.py"), "--device", device, *flags, "--csv", str(folder / f"{name}.csv")]

    found = {"environment": ["-m", "torch.utils.collect_env"]}
    found |= {name: measurement(name, *rest) for name, *rest in BEFORE_TESTS}
    found["tests"] = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/chain/test_gpu.py"]
    return found | {name: measurement(name, *rest) for name, *rest in MEASUREMENTS}


def run(arguments: list[str], log: Path, timeout: float) -> int | str:
    """Run a Python program with its output in `log`; return its exit code, or 'out of time'."""
    with open(log, "w") as file:
        try:
            command = [sys.executable, *arguments]
            return subprocess.run(command, cwd=FOLDER.parent, stdout=file, stderr=file, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            return "out of time"


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=180, help="stop after this long (default: 180)")
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the program itself")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("card.py: no CUDA device is available; --device cpu --tiny tries the program", file=sys.stderr)
        return 2
    folder = prepare_output_dir(options.output_dir)
    where, record = place(torch.device(options.device)), folder / "steps.json"
    deadline = time.monotonic() + 60 * options.minutes
    known = read_json_object(record)
    ended = {name: step for name, step in known.items() if step["exit"] == 0 and step["where"] == where}
    for name, arguments in steps(folder, options.device, options.tiny).items():
        if name in ended:
            continue
        started = time.monotonic()
        code = run(arguments, folder / f"{name}.log", max(0.0, deadline - started))
        ended[name] = {"exit": code, "seconds": time.monotonic() - started, "where": where}
        write_json(record, ended)
        shutil.make_archive(str(folder), "gztar", folder.parent, folder.name)  # one file to take away at any time
        print(f"{name}: exit {code}, {ended[name]['seconds']:.0f} s", flush=True)
    return 0 if all(step["exit"] == 0 for step in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
