"""Sweep the rank of a Kronecker-sparse chain: one training per rank, each in a process of its own, then compare.

    python rank_sweep_study.py --weight_path my_weight.pth --ranks 2 4 8 16 --log_scale
    python rank_sweep_study.py --weight_path my_weight.pth --target_relative_loss 0.1 --dry_run

Written to --output_dir: a folder rank_R for each rank (curves, checkpoints, train.log), and under --save_prefix
PREFIX_summary.csv and .json, PREFIX_runs.csv, PREFIX_all_curves.csv, PREFIX_floor.csv, PREFIX_config.json and the
figures PREFIX_loss_curves.png, PREFIX_final_losses.png, PREFIX_floor.png.
The same command again keeps finished ranks, resumes unfinished ones and trains failed ones again.
Exit codes: 0 well, 1 no rank succeeded, 2 bad input or another study's folder, 3 some ranks failed, 4 internal error,
130 interrupted.
"""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from ks.cli import startup

if __name__ == "__main__":
    startup.begin(__file__)

import torch

from ks import signals
from ks.bounds.floors import floor_curve
from ks.bounds.plan import Plan, make_plan
from ks.bounds.target_rank import ranks_around
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.cli.parser import Parser
from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import delete_leftovers, prepare_output_dir, write_csv
from ks.files.layout import SweepFiles
from ks.files.lock import locked
from ks.files.provenance import provenance
from ks.files.status import OK, Status
from ks.files.weights import packed
from ks.inputs.read import packed_inputs
from ks.report.plan_table import plan_notes, plan_table
from ks.report.summary import floor_rows
from ks.report.verdict import advice, check_above_floor
from ks.sweep import placement
from ks.sweep.claim import claim_folder
from ks.sweep.launcher import Launcher, Task
from ks.sweep.lifeline import stop_with_parent
from ks.sweep.local import LocalLauncher
from ks.sweep.progress import Progress, SlowWork
from ks.sweep.ray_cluster import RayLauncher
from ks.sweep.run import Result, Run, result_of, runs_of, seeds_of
from ks.training.checkpoints import settings_of
from ks.training.problem import Problem, resolve
from ks.training.shared_samples import SHARED_SAMPLES, shared_samples

TRAINER = Path(__file__).resolve().parent / "train_with_random.py"
DEFAULT_RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def build_parser() -> Parser[SweepConfig]:
    return Parser(SweepConfig, __doc__)


def ranks_of(config: SweepConfig, plan: Plan) -> list[int]:
    """Return the ranks to train: ascending, each once, none above --max_rank."""
    given = config.ranks or DEFAULT_RANKS
    if config.ranks is None and config.target_relative_loss is not None and plan.curve is not None:
        given = tuple(ranks_around(plan, config.target_relative_loss))
    ranks = sorted({rank for rank in given if config.max_rank is None or rank <= config.max_rank})
    if not ranks:
        raise UsageError(f"no rank is left: --max_rank {config.max_rank} excludes all of {' '.join(map(str, given))}")
    return ranks


def slots_of(config: SweepConfig, problem: Problem, runs: int) -> list[dict[str, str]]:
    """Return the environments of the trainings that run at the same time.

    Raises:
        UsageError: --gpus names a GPU that does not exist, or is given for another device.
    """
    jobs, cores = None if config.jobs == "auto" else int(config.jobs), placement.cpu_cores()
    if problem.device.type == "cpu":
        if config.gpus not in ("auto", "none"):
            raise UsageError(f"--gpus {config.gpus}: the device is {problem.device}; leave it out or use --device cuda")
        return placement.cpu_slots(jobs, runs, cores)
    if problem.device.index is not None:  # the trainings are given --device as it is
        if config.gpus != "auto":
            raise UsageError(f"--gpus {config.gpus} together with --device {config.device}: give one or the other")
        return placement.cpu_slots(min(jobs or runs, config.runs_per_gpu), runs, cores)
    gpus = placement.choose_gpus(config.gpus, torch.cuda.device_count())
    return placement.gpu_slots(gpus, config.runs_per_gpu, jobs, runs, cores)


def launcher_of(config: SweepConfig, problem: Problem, runs: int) -> Launcher:
    """Return the launcher that the flags name, for at most this many runs.

    Raises:
        UsageError: places that do not exist.
    """
    if config.launcher == "local":
        return LocalLauncher(slots_of(config, problem, runs), config.timeout_per_rank)
    if config.gpus not in ("auto", "none") or problem.device.index is not None:
        raise UsageError("--launcher ray chooses GPUs itself: give no --gpus but none, and no number in --device")
    weight_path = Path(config.weight_path).absolute()
    files = {str(weight_path): (f"{weight_path.stem}.pth", packed(problem.weight, config.transpose))}
    if config.inputs:
        inputs = Path(config.inputs).absolute()
        files[str(inputs)] = (f"inputs_{inputs.name}", packed_inputs(inputs, config.inputs_key or config.weight_key))
    return RayLauncher(
        config.ray_address,
        TRAINER,
        files,
        use_gpus=config.device != "cpu",
        runs_per_gpu=config.runs_per_gpu,
        jobs=None if config.jobs == "auto" else int(config.jobs),
        timeout=config.timeout_per_rank,
    )


def title_of(config: SweepConfig, problem: Problem) -> str:
    name = " ".join(filter(None, [Path(config.weight_path).name, problem.weight.key]))
    inputs = problem.layer_inputs.description["kind"]
    return f"{name}, {problem.rows} × {problem.cols}: {problem.chain.describe()}, {inputs} inputs"


def record_of(config: SweepConfig, problem: Problem, ranks: list[int]) -> dict:
    """Return the content of the sweep's config file."""
    seeds = seeds_of(config)
    return {
        "settings": settings_of(config, problem) | {"seed": seeds[0]},
        "ranks": ranks,
        "seeds": seeds,
        "title": title_of(config, problem),
        "arguments": vars(config),
        "problem": problem.describe(),
        "provenance": provenance(),
    }


def sweep(config: SweepConfig, problem: Problem, runs: list[Run], launcher: Launcher, weight: str) -> dict[Run, Result]:
    """Train every run that is not finished yet, the largest rank first, also when others fail.

    Args:
        config, problem, runs, launcher: of the sweep.
        weight: as the settings of the study record it.
    Returns:
        the results of the runs that are finished; after an interrupt, some are missing.
    """
    results: dict[Run, Result] = {}
    for run in runs:
        if signals.came():
            return results
        result = result_of(run, config.num_epochs, weight=weight)
        if result.ending == OK:
            results[run] = result
            console.note(f"{run.task.name}: finished before", config.quiet)
        elif not run.files.resume.exists():
            run.files.log.unlink(missing_ok=True)
    waiting = sorted((run for run in runs if run not in results), key=lambda run: (-run.rank, run.seed))
    run_of = {run.task: run for run in waiting}
    progress = Progress(waiting, config.num_epochs, config.quiet)

    def poll(running: list[Task]) -> None:
        signals.check()
        progress.poll(running)
        if len(running) == 1:
            import ks.report.outputs  # noqa: F401 - pandas and matplotlib load while the last training runs

    try:
        with sharing_samples(config, problem, waiting) as tasks:
            for task, outcome in launcher.run(tasks, poll):
                result = results[run_of[task]] = result_of(run_of[task], config.num_epochs, outcome, weight)
                progress.end(result, outcome)
    except KeyboardInterrupt:
        console.note("stopping", config.quiet)
    finally:
        progress.close()
    return results


@contextlib.contextmanager
def sharing_samples(config: SweepConfig, problem: Problem, runs: list[Run]) -> Iterator[list[Task]]:
    """Yield the tasks of the runs; those of the first seed, if they are several on this machine, share samples."""
    first = [run for run in runs if run.seed == seeds_of(config)[0]]
    if config.launcher != "local" or len(first) < 2:
        yield [run.task for run in runs]
        return
    with shared_samples(config, problem, first[0].rank, first[0].seed) as descriptor:
        inherited = () if descriptor is None else ((SHARED_SAMPLES, descriptor),)
        yield [dataclasses.replace(run.task, inherited=inherited) if run in first else run.task for run in runs]


def exit_code(results: list[Result]) -> int:
    statuses = {result.ending.status for result in results}
    if signals.came() or Status.INTERRUPTED in statuses:
        return console.EXIT_INTERRUPTED
    if Status.OK not in statuses:
        return console.EXIT_FAILED
    return console.EXIT_OK if statuses == {Status.OK} else console.EXIT_SOME_FAILED


@console.script
def main(argv=None) -> int:
    stop_with_parent()
    config = build_parser().parse(argv)
    if config.gpus == "none" and config.device == "auto":
        config = dataclasses.replace(config, device="cpu")
    problem = resolve(config)
    if problem.rows * problem.cols > 2**22 or config.inputs:
        console.note(f"computing the floors of {problem.rows} × {problem.cols}", config.quiet)
    plan = make_plan(
        problem.internal_weight(),
        problem.chain,
        problem.inputs,
        tight=config.tight_bounds,
        progress=SlowWork(config.quiet),
    )
    if config.inputs and plan.bounds is not None:
        isotropic = floor_curve(problem.isotropic_weight(), problem.chain)
        plan = dataclasses.replace(plan, isotropic_curve=isotropic)
    ranks = ranks_of(config, plan)
    floors = dict(zip(ranks, plan.floors(ranks), strict=True))
    remarks = plan_notes(plan, config.target_relative_loss)
    runs = runs_of(config, ranks, Path(config.output_dir).absolute(), TRAINER)
    if config.dry_run:
        for text in problem.notes:
            console.note(text, config.quiet)
        print("\n".join([*remarks, plan_table(problem.chain, floors, plan.isotropic_curve)]))
        print("\n".join(shlex.join(run.task.command) for run in runs))
        return console.EXIT_OK
    with contextlib.ExitStack() as running:
        launcher = running.enter_context(launcher_of(config, problem, len(runs)))
        files = SweepFiles(prepare_output_dir(config.output_dir), config.save_prefix)
        with locked(files.lock, "another sweep"), signals.deferred():
            record = record_of(config, problem, ranks)
            try:
                delete_leftovers(files.all())
                read = [Path(path) for path in (config.weight_path, config.inputs) if path]
                claim_folder(files, runs, record, read, config.overwrite)
                write_csv(files.floor_csv, columns.names(columns.FLOOR), floor_rows(plan, problem.predict_zero_loss))
                for text in (*problem.notes, *remarks):
                    console.note(text, config.quiet)
                weight = record["settings"]["weight"]
                ended = sweep(config, problem, runs, launcher, weight)
                running.close()  # stops the trainings that still run after an interrupt
                from ks.report.outputs import summarise, write_outputs
                from ks.report.summary_table import summary_table

                results = [ended.get(run) or result_of(run, config.num_epochs, weight=weight) for run in runs]
                rows_of_runs, rows = summarise(results, floors, problem, plan)
                if any(row["population_loss"] is None for row in rows_of_runs if row["status"] == OK):
                    console.note("floors are left out: the criterion is not the mean squared error", config.quiet)
                written = write_outputs(config, problem, plan, files, record, results, rows_of_runs, rows)
            except OSError as error:
                place = error.filename or files.directory
                print(
                    f"rank_sweep_study.py: {error.strerror}: {place}; fix the cause, then rerun the same command to "
                    "resume",
                    file=sys.stderr,
                )
                return console.EXIT_FAILED
    if signals.came():
        print("rank_sweep_study.py: interrupted; the same command resumes", file=sys.stderr)
    print("\n".join([summary_table(rows), *advice(rows, problem.sampling), *map(str, written)]))
    for row in rows_of_runs:
        check_above_floor(row["population_loss"], floors[row["rank"]], problem.predict_zero_loss)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
