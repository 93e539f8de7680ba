"""Interleaved timing, and CSV rows that name the hardware and the revision."""

import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ks.files.provenance import provenance
from ks.training.steps import cuda_graph


def interleaved_medians(
    functions: dict,
    device: torch.device,
    rounds: int = 15,
    calls: int = 5,
    *,
    seconds: float | None = None,
    clock=time.perf_counter,
) -> dict:
    """Return median milliseconds per call of each function; every round times all, so that noise meets them alike.

    Args:
        functions: name → function without arguments.
        device: synchronised before each reading of the clock.
        rounds: readings of each function, after one that does not count.
        calls: calls per reading.
        seconds: instead of calls, the time of a reading, about.
        clock: in seconds; time.process_time leaves out the time of other programs on the machine.
    """
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def reading(function, calls):
        synchronise()
        started = clock()
        for _ in range(calls):
            function()
        synchronise()
        return (clock() - started) * 1e3 / calls

    counts = dict.fromkeys(functions, calls)
    if seconds is not None:
        for function in functions.values():
            function()
        counts = {name: max(1, min(500, int(1e3 * seconds / reading(f, 2)))) for name, f in functions.items()}
    readings = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            readings[name].append(reading(function, counts[name]))
    return {name: statistics.median(values[1:]) for name, values in readings.items()}


def replayed(functions: dict, device: torch.device) -> dict:
    """Return functions that replay a CUDA graph of each function's calls; the functions themselves on a CPU."""
    return {name: cuda_graph(function) for name, function in functions.items()} if device.type == "cuda" else functions


def rotated(function, operands: list):
    """Return a function that calls `function` on each of several operands, so that no cache holds those of a call."""

    def call_all():
        for each in operands:
            function(*each)

    return call_all


def named_device(name: str) -> torch.device:
    """Return the device of a --device flag; exit with a line if it is not there."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"no CUDA device is available for --device {name}")
    return device


def seconds(*command) -> float:
    """Run a Python program with these arguments by this interpreter; return its wall time."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - started


def place(device: torch.device) -> dict:
    """Return what every row of a benchmark has besides its figures."""
    known = provenance()
    on_gpu = device.type == "cuda"
    return {
        "hardware": known["gpu"] if on_gpu else f"{known['cpu']}, {known['threads']} threads",
        "driver": known["driver"] if on_gpu else "",
        "torch": known["torch"],
        "python": known["python"],
        "revision": known["git_revision"],
    }


class Rows:
    """Rows that go to a CSV file and to the terminal as they come.

    Args:
        path: the CSV file, or None.
        resume: keep the rows of the file, as `known`; otherwise the file starts anew.
    """

    def __init__(self, path: Path | None, resume: bool = False):
        self.path, self.known = path, []
        if path is not None and path.exists():
            if resume:
                with path.open(newline="") as file:
                    self.known = list(csv.DictReader(file))
            else:
                path.unlink()

    def add(self, row: dict) -> None:
        values = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        print("  ".join(values[name] for name in values if name not in ("hardware", "driver", "revision")), flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(values))
                if new:
                    writer.writeheader()
                writer.writerow(values)
        self.known.append(values)
