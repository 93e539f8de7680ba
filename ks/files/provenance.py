"""Where and when a result was made: command line, versions, host, devices, git revision, memory."""

import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")


def provenance() -> dict:
    """Return the entries of a config file that say where its results were made."""
    root = Path(__file__).resolve().parent
    found: dict = {
        "command": [sys.executable, *sys.argv],
        "started": now(),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "git_revision": _output_of(["git", "describe", "--always", "--dirty", "--abbrev=12"], root),
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": (_output_of(query, root) or "").split("\n")[0] or None,
        }
    return found


def peak_memory(device: torch.device) -> dict:
    """Return the peak memory of this process so far in MiB, on the host and on its GPU."""
    import resource  # not on Windows

    unit = 2**10 if sys.platform != "darwin" else 2**20  # getrusage counts in KiB on Linux, in bytes on macOS
    found = {"peak_host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        found["peak_gpu_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output_of(command: list[str], folder: Path) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
