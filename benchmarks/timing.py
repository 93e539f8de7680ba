"""Interleaved timing, and CSV rows that name the hardware and the revision."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ks.files.provenance import provenance
from ks.model.timing import interleaved_medians


def interleaved_ms(functions: dict, device: torch.device, rounds: int = 15, clock=time.perf_counter) -> dict:
    """Return median milliseconds per call of each function, over so many rounds in which they take turns."""
    medians = interleaved_medians(functions, device, rounds=(rounds, rounds), clock=clock)
    return {name: 1e3 * value for name, value in medians.items()}


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
