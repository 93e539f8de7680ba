"""The choice of the launcher by the flags: this machine, this process, or a Ray cluster."""

from pathlib import Path

import torch

from ks.cli.flags import SweepConfig
from ks.errors import UsageError
from ks.study.local import LocalLauncher
from ks.study.placement import slots_of
from ks.study.task import Launcher


def launcher_of(
    config: SweepConfig, device: torch.device, runs: int, trainer: Path, files: dict[str, tuple[str, bytes]]
) -> Launcher:
    """Return the launcher that the flags name, for at most this many runs.

    Args:
        config: of the sweep.
        device: of the runs.
        runs: their number.
        trainer: absolute path of the training script.
        files: that runs on other machines read: absolute path, then name and content there.
    Raises:
        UsageError: places that do not exist.
    """
    if config.launcher == "local":
        return LocalLauncher(slots_of(config, device, runs), config.timeout_per_rank)
    if config.launcher == "inline":
        if config.timeout_per_rank is not None:
            raise UsageError("--launcher inline stops no run: leave out --timeout_per_rank")
        from ks.study.inline import InlineLauncher

        return InlineLauncher()
    if config.gpus not in ("auto", "none") or device.index is not None:
        raise UsageError("--launcher ray chooses GPUs itself: give no --gpus but none, and no number in --device")
    from ks.study.ray_cluster import RayLauncher

    return RayLauncher(
        config.ray_address,
        trainer,
        files,
        use_gpus=config.device != "cpu",
        jobs=None if config.jobs == "auto" else int(config.jobs),
        timeout=config.timeout_per_rank,
    )
