"""Interleaved timing, and CSV rows that say where they were measured."""

import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ks.results import provenance


def interleaved_medians(functions: dict, device: torch.device, rounds: int = 15, calls: int = 5) -> dict:
    """Median milliseconds a call of each function; every round times all of them, so that noise meets them alike.

    Args:
        functions: name → function without arguments.
        device: synchronised before each reading of the clock.
        rounds: readings per function, after one round that is not counted.
        calls: between two readings.
    """
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    readings = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            synchronise()
            started = time.perf_counter()
            for _ in range(calls):
                function()
            synchronise()
            readings[name].append((time.perf_counter() - started) * 1e3 / calls)
    return {name: statistics.median(values[1:]) for name, values in readings.items()}


def seconds(*command) -> float:
    """Wall time of a Python program with these arguments, run by this interpreter."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - started


def place(device: torch.device) -> dict:
    """What every row of a benchmark carries besides its figures."""
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
    """Rows that are appended to a CSV and printed as they come.

    Args:
        path: the CSV, or None for printing only.
        resume: keep what is there; otherwise the file is begun anew.
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
