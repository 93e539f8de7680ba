"""The launcher that the flags name, and the places on this machine where trainings run."""

from pathlib import Path

import torch

from ks.cli.flags import SweepConfig
from ks.errors import UsageError
from ks.study import placement
from ks.study.launcher import Launcher
from ks.study.local import LocalLauncher
from ks.study.ray_cluster import RayLauncher


def slots_of(config: SweepConfig, device: torch.device, runs: int) -> list[dict[str, str]]:
    """Return the environments of the trainings that run at the same time.

    Raises:
        UsageError: --gpus names a GPU that does not exist, or is given for another device.
    """
    jobs, cores = None if config.jobs == "auto" else int(config.jobs), placement.cpu_cores()
    if device.type == "cpu":
        if config.gpus not in ("auto", "none"):
            raise UsageError(f"--gpus {config.gpus}: the device is {device}; leave it out or use --device cuda")
        return placement.cpu_slots(jobs, runs, cores)
    if device.index is not None:  # the trainings are given --device as it is
        if config.gpus != "auto":
            raise UsageError(f"--gpus {config.gpus} together with --device {config.device}: give one or the other")
        return placement.cpu_slots(1, runs, cores)
    gpus = placement.choose_gpus(config.gpus, torch.cuda.device_count())
    return placement.gpu_slots(gpus, jobs, runs, cores)


def launcher_of(
    config: SweepConfig, device: torch.device, runs: int, trainer: Path, files: dict[str, tuple[str, bytes]]
) -> Launcher:
    """Return the launcher that the flags name, for at most this many runs.

    Args:
        config: of the sweep.
        device: of the trainings.
        runs: their number.
        trainer: absolute path of the training script.
        files: that trainings on other machines read: absolute path, then name and content there.
    Raises:
        UsageError: places that do not exist.
    """
    if config.launcher == "local":
        return LocalLauncher(slots_of(config, device, runs), config.timeout_per_rank)
    if config.gpus not in ("auto", "none") or device.index is not None:
        raise UsageError("--launcher ray chooses GPUs itself: give no --gpus but none, and no number in --device")
    return RayLauncher(
        config.ray_address,
        trainer,
        files,
        use_gpus=config.device != "cpu",
        jobs=None if config.jobs == "auto" else int(config.jobs),
        timeout=config.timeout_per_rank,
    )
