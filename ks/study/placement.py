"""Which CPU cores and GPUs each run may use, as environment variables of its process."""

import os

import torch

from ks.cli.flags import SweepConfig
from ks.errors import UsageError


def slots_of(config: SweepConfig, device: torch.device, runs: int) -> list[dict[str, str]]:
    """Return the environments of the processes that run at the same time.

    Raises:
        UsageError: --gpus names a GPU that does not exist, or is given for another device.
    """
    jobs, cores = None if config.jobs == "auto" else int(config.jobs), cpu_cores()
    if device.type == "cpu":
        if config.gpus not in ("auto", "none"):
            raise UsageError(f"--gpus {config.gpus}: the device is {device}; leave it out or use --device cuda")
        return cpu_slots(jobs, runs, cores)
    if device.index is not None:  # the runs are given --device as it is
        if config.gpus != "auto":
            raise UsageError(f"--gpus {config.gpus} together with --device {config.device}: give one or the other")
        return cpu_slots(1, runs, cores)
    return gpu_slots(choose_gpus(config.gpus, torch.cuda.device_count()), jobs, runs, cores)


def cpu_cores() -> int:
    """Return the number of cores that this process may use: OMP_NUM_THREADS if set, else the cores it is bound to."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isascii() and given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_slots(jobs: int | None, runs: int, cores: int) -> list[dict[str, str]]:
    """Return the environments of the runs that train at the same time, with the cores split among them.

    Args:
        jobs: runs at a time; None for one per core, the fastest (benchmarks/README.md).
        runs: number of runs.
        cores: for all of them together.
    """
    jobs = min(jobs or cores, runs)
    return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))} for _ in range(jobs)]


def gpu_slots(gpus: list[str], jobs: int | None, runs: int, cores: int) -> list[dict[str, str]]:
    """Return the environments of the runs that train at the same time on GPUs, each of which sees one GPU.

    Args:
        gpus: names for CUDA_VISIBLE_DEVICES.
        jobs: largest number of runs at a time, or None.
        runs, cores: as in `cpu_slots`.
    """
    places = gpus[: min(jobs or runs, runs)]
    threads = str(max(1, cores // len(places)))
    return [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads} for gpu in places]


def choose_gpus(gpus: str, device_count: int) -> list[str]:
    """Return the GPUs to use, as names for CUDA_VISIBLE_DEVICES; an inherited value of it is respected.

    Args:
        gpus: 'auto' (all), or positions such as '0,1' among the GPUs that this process sees.
        device_count: number of GPUs that it sees.
    Raises:
        UsageError: not such a list, or a GPU that does not exist.
    """
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = inherited.split(",") if inherited else [str(index) for index in range(device_count)]
    if gpus == "auto":
        return names[:device_count]
    chosen = gpus.split(",")
    if not all(name.isascii() and name.isdigit() and int(name) < device_count for name in chosen) or len(
        set(chosen)
    ) < len(chosen):
        raise UsageError(
            f"--gpus {gpus}: auto, none, or different numbers below {device_count} such as 0,1 are allowed"
        )
    return [names[int(name)] for name in chosen]
