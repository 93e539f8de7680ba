"""Measure the wall time of the demo's sweep against the plain loop, run rank after rank.

    python benchmarks/bench_sweep.py --csv sweep.csv
    python benchmarks/bench_sweep.py --num_epochs 1 --rounds 3 --jobs 1 2
    python benchmarks/bench_sweep.py --device cuda
    python benchmarks/bench_sweep.py --overhead 20
    python benchmarks/bench_sweep.py --shares --init_method xavier_uniform --rounds 3
    python benchmarks/bench_sweep.py --shares --sweep --weight_path model.safetensors --inputs moments.safetensors …

Both train the same ranks of a weight like the demo's (2 … 64 of 1024 × 2048) on the same number of samples and epochs,
each rank in a process of its own. The sweep also computes floors, validates, saves and draws; the plain loop only
trains. With `--num_epochs 1` nearly all of the time is overhead: its share for one rank is what a rank costs besides
its steps. `--overhead` measures only what a launcher adds to a program that does nothing; `--shares` prints where the
wall time of a sweep goes, and the memory of its largest process; `--sweep`, with flags of rank_sweep_study.py behind
it, takes another sweep.
"""

import argparse
import csv
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from timing import Rows, place, seconds

from ks.cli import console
from ks.study.processes import Launcher, LocalLauncher, Task
from ks.study.ray_cluster import RayLauncher
from ks.training.problem import choose_device

ROOT = Path(__file__).resolve().parent.parent
DEMO_RANKS = (2, 4, 8, 16, 32, 64)


def overhead(launcher_of: Callable[[Path], Launcher], tasks: int) -> float:
    """Return the seconds per task that a launcher adds to a program that does nothing.

    Args:
        launcher_of: makes the launcher for a script.
        tasks: number of tasks, one after another.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "does_nothing.py"
        script.touch()
        alone = median(seconds(script) for _ in range(tasks))
        names = [Path(folder) / f"task_{number}" for number in range(tasks)]
        for name in names:
            name.mkdir()
        work = [Task(name.name, (sys.executable, str(script)), name / "train.log") for name in names]
        started = time.perf_counter()
        with launcher_of(script) as launcher:
            connected = time.perf_counter() - started
            outcomes = list(launcher.run(work, poll=lambda running: None))
        assert all(outcome.code == 0 for _, outcome in outcomes)
        return (time.perf_counter() - started - connected) / tasks - alone


def shares(flags: list, results: Path) -> dict[str, float]:
    """Return the seconds until the first run starts, of all runs, of a run beside its training, and after the last run,
    with the memory of the largest process.

    Args:
        flags: of a sweep that is not quiet.
        results: the folder that it writes.
    """
    script, more = str(ROOT / "rank_sweep_study.py"), ("--latency_seconds", 0, "--output_dir", results)
    command = [sys.executable, script, *map(str, (*flags, *more))]
    started = time.perf_counter()
    first = last = 0.0
    of_runs: list[float] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            now = time.perf_counter() - started
            if ": training (1 of " in line:
                first = now
            elif ended := re.search(r"rank \d+: ok.*, ([\d.]+) s$", line):
                last = now
                of_runs.append(float(ended[1]))
    assert process.returncode == 0
    whole = time.perf_counter() - started
    trained = []
    for table in results.rglob("*_runs.csv"):
        with open(table, newline="") as file:
            trained += [float(row["train_seconds"]) for row in csv.DictReader(file)]
    beside = (sum(of_runs) - sum(trained)) / len(trained)
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": whole, "until_the_first_run": first, "runs": last - first, "beside_training": beside,
            "end": whole - last, "largest_process_mib": largest}  # fmt: skip


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 2048), help="m and n (default: 1024 2048)")
    parser.add_argument("--ranks", type=int, nargs="+", default=DEMO_RANKS, help="(default: those of the demo)")
    parser.add_argument("--num_epochs", type=int, default=20, help="(default: 20, as the demo)")
    parser.add_argument("--num_samples", type=int, default=5000, help="(default: 5000, as the demo)")
    parser.add_argument("--init_method", default="power_law", help="of the weight (default: power_law, as the demo)")
    parser.add_argument("--shares", action="store_true", help="print where the time of a sweep without latencies goes")
    parser.add_argument("--rounds", type=int, default=1, help="interleaved repetitions (default: 1)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--jobs", nargs="+", default=["auto"], help="--jobs of the sweeps (default: auto)")
    parser.add_argument("--overhead", type=int, metavar="TASKS", help="measure only what launching adds to a task")
    parser.add_argument("--ray_address", help="with --overhead: measure this Ray cluster too")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--sweep", nargs=argparse.REMAINDER, help="with --shares: the flags of another sweep, at last")
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    if options.overhead:
        launchers: dict[str, Callable[[Path], Launcher]] = {"local": lambda script: LocalLauncher([{}])}
        if address := options.ray_address:
            launchers["ray"] = lambda script: RayLauncher(address, script, {}, use_gpus=False, jobs=1)
        added = {f"{name}_seconds_a_task": overhead(made, options.overhead) for name, made in launchers.items()}
        Rows(options.csv).add({"tasks": options.overhead} | added | place(device))
        return 0
    size = ("--num_epochs", options.num_epochs, "--num_samples", options.num_samples, "--device", options.device)
    ours = {f"jobs_{jobs}": ("--jobs", jobs) for jobs in options.jobs}
    found = {name: [] for name in ("plain", *ours)}
    with tempfile.TemporaryDirectory() as folder:
        weight = Path(folder) / "weight.pth"
        m, n = options.shape
        shape = ("--output_features", m, "--input_features", n, "--init_method", options.init_method)
        seconds(ROOT / "generate_test_weight.py", *shape, "--output_path", weight)
        sweep = options.sweep or ["--weight_path", weight, "--ranks", *options.ranks, *size]
        for number in range(options.rounds if options.shares else 0):
            Rows(options.csv).add(shares(sweep, Path(folder) / f"shares_{number}") | place(device))
        if options.shares:
            return 0
        for number in range(options.rounds):
            plain = (ROOT / "benchmarks" / "plain_train.py", "--weight_path", weight, *size)
            found["plain"].append(sum(seconds(*plain, "--rank", rank) for rank in options.ranks))
            sweep = (ROOT / "rank_sweep_study.py", "--weight_path", weight, "--ranks", *options.ranks, *size, "--quiet")
            for name, flags in ours.items():
                found[name].append(seconds(*sweep, *flags, "--output_dir", Path(folder) / f"{number}_{name}"))
    times = {name: median(values) for name, values in found.items()}
    row = {
        "shape": f"{m}x{n}",
        "ranks": len(options.ranks),
        "num_epochs": options.num_epochs,
        "num_samples": options.num_samples,
        "device": options.device,
    }
    row |= {f"{name}_seconds": value for name, value in times.items()}
    row |= {f"plain_over_{name}": times["plain"] / value for name, value in times.items() if name != "plain"}
    Rows(options.csv).add(row | place(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
