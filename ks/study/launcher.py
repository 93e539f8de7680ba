"""Where runs train, as the flags choose: this machine with its cores and GPUs, this process, or a cluster."""

import bdb
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from ks import signals
from ks.cli.console import EXIT_INTERNAL, EXIT_USAGE
from ks.cli.flags import SweepConfig
from ks.errors import UsageError, one_line
from ks.files.limits import cpu_cores
from ks.study.processes import Exit, Launcher, LocalLauncher, Start, Task
from ks.study.slurm_cluster import SlurmLauncher
from ks.training.problem import choose_device


def launcher_of(
    config: SweepConfig, runs: int, trainer: Path, files: dict[str, tuple[str, bytes]], start: Start
) -> Launcher:
    """Return the launcher that the flags choose, for at most this many runs.

    Args:
        trainer: absolute path of the training script.
        files: that runs on other machines read: absolute path, then name and content there.
        start: starts a run on this machine.
    Raises:
        UsageError: places that do not exist.
    """
    device = choose_device(config.device)
    if config.launcher == "local":
        return LocalLauncher(slots_of(config, device, runs), config.timeout_per_rank, start)
    if config.launcher == "inline":
        if config.timeout_per_rank is not None or config.gpus not in ("auto", "none"):
            raise UsageError("--launcher inline trains here, on --device: leave out --timeout_per_rank and --gpus")
        return InlineLauncher()
    if config.gpus not in ("auto", "none") or device.index is not None:
        raise UsageError(
            f"--launcher {config.launcher} chooses GPUs itself: give no --gpus but none, and no number in --device"
        )
    if config.launcher == "slurm":
        return SlurmLauncher(config, runs)
    from ks.study.ray_cluster import RayLauncher

    jobs = None if config.jobs == "auto" else int(config.jobs)
    timeout = config.timeout_per_rank
    return RayLauncher(config.ray_address, trainer, files, use_gpus=config.device != "cpu", jobs=jobs, timeout=timeout)


def slots_of(config: SweepConfig, device: torch.device, runs: int) -> list[dict[str, str]]:
    """Return the environments of the processes that run at the same time, which split the cores.

    A GPU has one run. On a CPU, one run per core is the fastest (benchmarks/README.md).

    Raises:
        UsageError: a GPU in --gpus that does not exist, or --gpus is given for another device.
    """
    cores, jobs = cpu_cores(), None if config.jobs == "auto" else int(config.jobs)
    if device.type == "cpu":
        if config.gpus not in ("auto", "none"):
            raise UsageError(f"--gpus {config.gpus}: the device is {device}; leave it out or use --device cuda")
        slots: list[dict[str, str]] = [{}] * min(jobs or cores, runs)
    elif device.index is not None or config.gpus == "none":  # the runs are given --device as it is
        if config.gpus != "auto":
            raise UsageError(f"--gpus {config.gpus} together with --device {config.device}: give one or the other")
        slots = [{}]
    else:
        gpus = choose_gpus(config.gpus, torch.cuda.device_count())
        slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:jobs][:runs]]
    return [slot | {"OMP_NUM_THREADS": str(max(1, cores // len(slots)))} for slot in slots]


def choose_gpus(gpus: str, device_count: int) -> list[str]:
    """Return the GPUs to use, as names for CUDA_VISIBLE_DEVICES; an inherited value of it is respected.

    Args:
        gpus: 'auto' (all), or positions such as '0,1' among the `device_count` GPUs that this process sees.
    Raises:
        UsageError: not such a list, or a GPU that does not exist.
    """
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = inherited.split(",") if inherited else [str(index) for index in range(device_count)]
    if gpus == "auto":
        return names[:device_count]
    chosen = gpus.split(",")
    known = all(name.isascii() and name.isdigit() and int(name) < device_count for name in chosen)
    if not known or len(set(chosen)) < len(chosen):
        raise UsageError(
            f"--gpus {gpus}: auto, none, or different numbers below {device_count} such as 0,1 are allowed"
        )
    return [names[int(name)] for name in chosen]


class InlineLauncher(Launcher):
    """Calls the main function of a task's script in this process, so that `breakpoint()` stops at the terminal.

    The output of a run stays on the terminal; its log has a line about that.
    """

    def run(self, tasks: Iterable[Task], poll: Callable[[list[Task]], None]) -> Iterator[tuple[Task, Exit]]:
        threads = torch.get_num_threads()
        for task in tasks:
            poll([task])
            started = time.monotonic()
            code, error = _call(task)
            torch.set_num_threads(threads)  # a run takes as many as pay
            yield task, Exit(code, time.monotonic() - started, error=error)
            if signals.came():
                raise KeyboardInterrupt


def _call(task: Task) -> tuple[int, str]:
    """Return the exit code of a task, and why it could not start."""
    _, script, *arguments = task.command
    try:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        task.log.write_text("This run printed to the terminal of its sweep (--launcher inline).\n", "utf-8")
        main = runpy.run_path(script)["main"]
        main = getattr(main, "__wrapped__", main)  # without the end of signals and the exit that a process has
    except OSError as error:
        return 1, f"it could not start: {error}"
    try:
        return main(arguments), ""
    except Exception as error:  # of one run; it leaves the others
        if bdb.BdbQuit in (type(error), type(error.__cause__)):
            raise KeyboardInterrupt from error  # leaving the debugger ends the sweep
        if isinstance(error, UsageError):
            print(one_line(error), file=sys.stderr)
            return EXIT_USAGE, ""
        traceback.print_exc()
        return EXIT_INTERNAL, ""
