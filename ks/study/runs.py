"""The runs of a study: its ranks and seeds, their commands, when one may stop, and how each one ended."""

import dataclasses
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ks.bounds.floors import Floor
from ks.bounds.rank_floors import RankFloors
from ks.cli.console import EXIT_FAILED, EXIT_OK
from ks.cli.flags import SweepConfig
from ks.cli.parser import to_arguments
from ks.errors import UsageError
from ks.files.atomic import atomic_path, prepare_output_dir, read_json_object, write_json
from ks.files.curves import write_curves
from ks.files.layout import RunFiles, run_files
from ks.files.schema import RunConfig, StudyRecord, TrainingLog, read_json_as
from ks.files.status import OK, Ending, Status, ended_well
from ks.report.verdict import converged_loss
from ks.study.processes import Exit, Task
from ks.training.run_state import RunState, read_state, settings_in

DEFAULT_RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
TARGETS = ("target_relative_loss", "target_loss_increase")  # flags, of which one may be given


@dataclass(frozen=True)
class Run:
    """One rank with one seed. stop_below: relative population loss that ends it early, or None."""

    rank: int
    seed: int
    files: RunFiles
    task: Task
    stop_below: float | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended, with its curves and its log."""

    run: Run
    ending: Ending
    curves: list[dict]
    log: TrainingLog


def were_disturbed(results: Sequence[Result], rank: int) -> bool:
    """Return whether other runs were going on at the end of those of a rank, when its times on the CPU are measured."""
    logs = {id(result.log): result.log for result in results if result.log.started and result.log.ended}
    own = [result.log for result in results if result.run.rank == rank and id(result.log) in logs]
    return any(
        other is not log and other.started < log.ended <= other.ended and other.ended > log.started
        for log in own
        if log.latency is not None and log.latency.device == "cpu"
        for other in logs.values()
    )


def ranks_of(
    config: SweepConfig, plan: RankFloors, study: StudyRecord | None, target: float | None
) -> tuple[set[int], list[int]]:
    """Return the ranks to train, none above --max_rank, and all ranks of the study, ascending.

    A rerun without --ranks trains those of the study that the folder holds; so does one with more epochs, beside
    its own. The target is relative to the zero predictor.
    """
    before = set(study.ranks) if study else set()
    given = set(config.ranks or ())
    new_target = study is None or any(study.arguments.get(name) != getattr(config, name) for name in TARGETS)
    if not given and target is not None and new_target and plan.has_floors:
        given = set(plan.ranks_around(target))
    if not given or (study and study.settings.get("num_epochs") != config.num_epochs):
        given |= before
    given = given or set(DEFAULT_RANKS)
    chosen = {rank for rank in given if config.max_rank is None or rank <= config.max_rank}
    if not chosen:
        listed = " ".join(map(str, sorted(given)))
        raise UsageError(f"no rank is left: --max_rank {config.max_rank} excludes all of {listed}")
    return chosen, sorted(chosen | before)


def trained_ranks(ranks: Iterable[int], saturation: int, output_dir: Path) -> dict[int, int]:
    """Return the rank that is trained for each rank: itself, but one alone from saturation on, where chains are equal.

    That is the one that has begun before, else the smallest.
    """
    ranks = sorted(ranks)
    saturated = [rank for rank in ranks if rank >= saturation]
    begun = [rank for rank in saturated if run_files(output_dir, rank, None, None).resume.exists()]
    return {rank: (begun or saturated)[0] if rank in saturated else rank for rank in ranks}


def stop_losses(config: SweepConfig, floors: Mapping[int, Floor | None], target: float | None) -> dict[int, float]:
    """Return the relative loss at which --stop_at ends each rank; the target is relative too.

    Raises:
        UsageError: --stop_at without what it refers to.
    """
    if config.stop_at == "never":
        return {}
    if config.stop_at == "target":
        if target is None:
            raise UsageError("--stop_at target needs --target_relative_loss or --target_loss_increase")
        return dict.fromkeys(floors, target)
    known = {rank: floor for rank, floor in floors.items() if floor is not None}
    if not known:
        raise UsageError("--stop_at floor needs a floor, and this chain has none")
    return {rank: converged_loss(floor.upper) for rank, floor in known.items()}


def seeds_of(config: SweepConfig) -> list[int]:
    """Return the seeds of a sweep, each once, the first one first."""
    return list(dict.fromkeys(config.seeds or [config.seed]))


def runs_of(
    config: SweepConfig, ranks: list[int], trainer: Path, stop_below: Mapping[int, float] = {}, layer: str = ""
) -> list[Run]:
    """Return the runs of a sweep, by rank and seed.

    Args:
        trainer: absolute path of the training script.
        stop_below: relative population loss that ends a rank early, for the ranks that have one.
        layer: part of the names of the runs, in a study of several layers.
    """
    seeds = seeds_of(config)
    runs = []
    for rank in ranks:
        for seed in seeds:
            files = run_files(config.files().directory, rank, seed, seeds[0])
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
            name = ", ".join(filter(None, [layer, f"rank {rank}", f"seed {seed}" if len(seeds) > 1 else ""]))
            command = (sys.executable, str(trainer), *to_arguments(settings))
            runs.append(Run(rank, seed, files, Task(name, command, files.log), stop_below.get(rank)))
    return runs


def result_of(run: Run, num_epochs: int, exit: Exit | None = None, study: dict | None = None) -> Result:
    """Read how a run ended; this alone decides whether a run of a study is done.

    Args:
        exit: of its process; None if it has not run in this sweep: then it had ended before, or it is interrupted.
        study: settings of the study; a run on another weight or other inputs has failed. None compares nothing.
    """
    otherwise = f"{run.task.name} is trained again" if exit is None else f"{run.task.name} has failed"
    state = read_state(run.files, num_epochs, run.stop_below, otherwise)
    ending = state.ending if exit is None else _ending_after(exit, state)
    if study is not None and ended_well(ending) and (replaced := _replaced(run.files, study)):
        ending = Ending(Status.FAILED, replaced)
    return Result(run, ending, state.curves, state.log)


def _ending_after(exit: Exit, state: RunState) -> Ending:
    """Return how a run ended in this sweep; the status in its log counts only if the exit code agrees with it."""
    if exit.error:
        return Ending(Status.FAILED, exit.error)
    if exit.timed_out:
        return Ending(Status.TIMED_OUT)
    if exit.code == EXIT_OK and state.ending == OK:
        return OK
    if exit.code == EXIT_FAILED and state.ending.status in (Status.DIVERGED, Status.OUT_OF_MEMORY):
        return state.ending
    return Ending(Status.FAILED, f"exit {exit.code}")


def _replaced(files: RunFiles, study: dict) -> str:
    """Return which input or edit changed between the start of the study and that of the run; empty if none did."""
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


def as_rank(result: Result, run: Run) -> Result:
    """Return the result of a run above saturation, whose chain is that of a rank that was trained.

    Its folder gets the files of the trained run, under its own names; the result of a trained rank stays as it is.
    """
    if result.run.rank == run.rank:
        return result
    source, target, rank = result.run.files, run.files, {"rank": run.rank}
    curves = [row | rank for row in result.curves]
    if curves:
        prepare_output_dir(target.directory)
        config = read_json_object(source.config)
        config |= {key: config.get(key, {}) | rank for key in ("settings", "arguments")}
        write_json(
            target.config, config | {"as_rank": result.run.rank, "files": [path.name for path in target.results()]}
        )
        write_curves(target, curves)
        for saved, path in ((source.final, target.final), (source.best, target.best)):
            path.unlink(missing_ok=True)
            if saved.exists():
                with atomic_path(path) as temporary:
                    shutil.copyfile(saved, temporary)
        write_json(target.training_log, read_json_object(source.training_log) | {"as_rank": result.run.rank})
        target.log.write_text(
            f"The chain of rank {run.rank} is that of rank {result.run.rank}; see {source.log}\n", "utf-8"
        )
    ending = result.ending
    if ended_well(ending):
        ending = dataclasses.replace(ending, detail=f"as rank {result.run.rank}")
    return dataclasses.replace(result, run=run, ending=ending, curves=curves)
