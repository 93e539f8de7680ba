"""One training of a sweep: its rank, seed, files and process, and its result."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ks.cli.console import EXIT_FAILED, EXIT_OK
from ks.cli.flags import SweepConfig
from ks.cli.parser import to_arguments
from ks.errors import UsageError
from ks.files.curves import curves_if_any
from ks.files.layout import RunFiles, run_files
from ks.files.schema import Latency, RunConfig, TrainingLog, read_json_as
from ks.files.status import OK, Ending, Status, ended_well
from ks.study.launcher import Outcome, Task
from ks.training.checkpoints import is_finished, settings_in


@dataclass(frozen=True)
class Run:
    """One training of a sweep. stop_below: relative population loss that ends it early, or None."""

    rank: int
    seed: int
    files: RunFiles
    task: Task
    stop_below: float | None = None


def seeds_of(config: SweepConfig) -> list[int]:
    """Return the seeds of a sweep, each once, the first one first."""
    return list(dict.fromkeys(config.seeds or [config.seed]))


def runs_of(
    config: SweepConfig, ranks: list[int], output_dir: Path, trainer: Path, stop_below: Mapping[int, float] = {}
) -> list[Run]:
    """Return the runs of a sweep, by rank and seed.

    Args:
        config: of the sweep.
        ranks: to train.
        output_dir: absolute path of the results folder.
        trainer: absolute path of the training script.
        stop_below: relative population loss that ends a rank early, for the ranks that have one.
    """
    seeds = seeds_of(config)
    runs = []
    for rank in ranks:
        for seed in seeds:
            files = run_files(output_dir, rank, seed, seeds[0])
            settings = config.training_settings() | {
                "weight_path": Path(config.weight_path).absolute(),
                "inputs": Path(config.inputs).absolute() if config.inputs else None,
                "seed": seed,
                "rank": rank,
                "stop_below": stop_below.get(rank),
                "resume": True,
                "output_dir": files.directory,
                "save_prefix": files.prefix,
            }
            name = f"rank {rank}" if len(seeds) == 1 else f"rank {rank}, seed {seed}"
            command = (sys.executable, str(trainer), *to_arguments(settings))
            runs.append(Run(rank, seed, files, Task(name, command, files.log), stop_below.get(rank)))
    return runs


@dataclass(frozen=True)
class Result:
    """How a run ended, with its curves, read once.

    train_seconds: duration of the training, latency: of its chain and of dense; None if unknown. copy_of: the rank
    whose results are copied, or None.
    """

    run: Run
    ending: Ending
    curves: list[dict]
    train_seconds: float | None
    copy_of: int | None = None
    latency: Latency | None = None


def result_of(run: Run, num_epochs: int, outcome: Outcome | None = None, study: dict | None = None) -> Result:
    """Read the files of a run.

    Args:
        run: of a sweep.
        num_epochs: that it was to train.
        outcome: of its process; None if it has not ended in this sweep: then it had finished before or is interrupted.
        study: settings of the study; a run on another weight or other inputs has failed. None compares nothing.
    """
    curves = curves_if_any(run.files.curves_csv)
    try:
        log = read_json_as(run.files.training_log, TrainingLog)
    except UsageError:
        log = TrainingLog("")
    otherwise = f"{run.task.name} is trained again" if outcome is None else f"{run.task.name} has failed"
    finished = is_finished(run.files, num_epochs, curves, otherwise, run.stop_below)
    ending = _ending(outcome, finished, log, bool(curves))
    if study is not None and ended_well(ending) and (replaced := _replaced(run.files, study)):
        ending = Ending(Status.FAILED, replaced)
    return Result(run, ending, curves, log.train_seconds, log.copy_of, log.latency)


def _replaced(files: RunFiles, study: dict) -> str:
    """Return what was another one when the run began than when the study did; empty if nothing was."""
    try:
        config = read_json_as(files.config, RunConfig)
        trained = settings_in(config.settings, config.loss and config.loss.name)
    except UsageError:
        trained = {}
    for name in ("weight", "inputs", "criterion", "metrics"):
        if (seen := trained.get(name, "an unknown one")) != study.get(name, seen):
            if name in ("weight", "inputs"):
                return f"the file of the {name} was replaced: trained on {seen}, the study is of {study[name]}"
            return f"{name} edited since the study began: trained with {seen}, the study has {study[name]}"
    return ""


def _ending(outcome: Outcome | None, finished: bool, log: TrainingLog, begun: bool) -> Ending:
    if outcome is None:
        if finished:
            return OK if log.copy_of is None else Ending(Status.OK, f"copy of rank {log.copy_of}")
        if log.status in (Status.DIVERGED, Status.OUT_OF_MEMORY, Status.FAILED):
            return Ending(Status(log.status))
        return Ending(Status.INTERRUPTED if log.status or begun else Status.NOT_STARTED)
    if outcome.error:
        return Ending(Status.FAILED, outcome.error)
    if outcome.timed_out:
        return Ending(Status.TIMED_OUT)
    if outcome.returncode == EXIT_OK and finished:
        return OK
    if outcome.returncode == EXIT_FAILED and log.status in (Status.DIVERGED, Status.OUT_OF_MEMORY):
        return Ending(Status(log.status))
    return Ending(Status.FAILED, f"exit {outcome.returncode}")
