"""Sweep the rank of a Kronecker-sparse chain: one training per rank, each in a process of its own, then compare.

    python rank_sweep_study.py --weight_path my_weight.pth --ranks 2 4 8 16 --log_scale
    python rank_sweep_study.py --weight_path my_weight.pth --target_relative_loss 0.1 --dry_run

Written to --output_dir: a folder rank_R for each rank (curves, checkpoints, train.log), and under --save_prefix
PREFIX_summary.csv and .json, PREFIX_runs.csv, PREFIX_all_curves.csv, PREFIX_floor.csv, PREFIX_config.json and the
figures PREFIX_loss_curves.png, PREFIX_final_losses.png, PREFIX_floor.png.
The same command again keeps finished ranks, goes on with unfinished ones and retrains failed ones.
Exit codes: 0 well, 1 no rank succeeded, 2 bad input or another study's folder, 3 some ranks failed, 130 interrupted.
"""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ks import cli, launch, launch_ray, plots, report, results, resume, summary
from ks.lock import locked
from ks.plan import Plan, make_plan
from ks.problem import Problem, resolve
from ks.progress import Progress
from ks.study import read_study
from ks.weights import packed

SCRIPT = "rank_sweep_study.py"
TRAINER = Path(__file__).resolve().parent / "train_with_random.py"
DEFAULT_RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    # The brief's rank folder holds no epoch checkpoints: none unless asked for.
    cli.add_shared_training_groups(parser, num_epochs=50, save_interval=0)
    group = parser.add_argument_group("sweep")
    defaults = " ".join(map(str, DEFAULT_RANKS))
    group.add_argument("--ranks", type=cli.positive_int, nargs="+", help=f"ranks to train (default: {defaults})")
    group.add_argument("--max_rank", type=cli.positive_int, help="leave out larger ranks")
    group.add_argument(
        "--target_relative_loss",
        type=cli.open_fraction,
        help="name the smallest rank that can reach this share of the loss of predicting 0; without --ranks, sweep "
        "around it",
    )
    group.add_argument(
        "--seeds", type=cli.non_negative_int, nargs="+", help="train every rank with each of these (default: --seed)"
    )
    group.add_argument("--dry_run", action="store_true", help="print the plan and the commands, train nothing")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="redo what is in --output_dir, also another study; without it, "
        "finished ranks are kept and others go on where they stopped",
    )
    group.add_argument(
        "--timeout_per_rank", type=cli.positive_float, metavar="SECONDS", help="stop a training after this long"
    )
    group = parser.add_argument_group("places")
    group.add_argument(
        "--jobs",
        type=cli.auto_or(cli.positive_int),
        default="auto",
        help="trainings at a time (default: auto, one for each CPU core, or --runs_per_gpu for each GPU)",
    )
    group.add_argument(
        "--launcher",
        choices=("local", "ray"),
        default="local",
        help="where trainings run: on this machine, or on a Ray cluster (default: local)",
    )
    group.add_argument(
        "--ray_address",
        default="auto",
        metavar="HOST:PORT",
        help="head of the Ray cluster (default: auto, the one that this machine has joined)",
    )
    group.add_argument("--gpus", default="auto", help="auto, none, or numbers such as 0,1 (default: auto)")
    group.add_argument("--runs_per_gpu", type=cli.positive_int, default=1, help="trainings a GPU (default: 1)")
    cli.add_output_flags(parser, output_dir="./rank_sweep_results", save_prefix="rank_sweep")
    cli.add_plot_flags(parser)
    return parser


def ranks_of(config, plan: Plan) -> list[int]:
    """The ranks to train: ascending, each once, none above --max_rank."""
    given = config.ranks or DEFAULT_RANKS
    if config.ranks is None and config.target_relative_loss is not None and plan.curve is not None:
        given = plan.ranks_around(config.target_relative_loss)
    ranks = sorted({rank for rank in given if config.max_rank is None or rank <= config.max_rank})
    if not ranks:
        raise ValueError(f"no rank is left: --max_rank {config.max_rank} excludes all of {' '.join(map(str, given))}")
    return ranks


def seeds_of(config) -> list[int]:
    return list(dict.fromkeys(config.seeds or [config.seed]))


def run_files(output_dir: Path, rank: int, seed: int, first_seed: int) -> results.RunFiles:
    """The first seed's files lie in rank_R itself, so that adding seeds moves nothing."""
    return results.rank_files(output_dir, rank, None if seed == first_seed else seed)


def make_task(config, rank: int, seed: int, files: results.RunFiles) -> launch.Task:
    """One training as a process: absolute paths, this interpreter, its output into train.log."""
    settings = cli.shared_settings(config) | {
        "weight_path": Path(config.weight_path).absolute(),
        "seed": seed,
        "rank": rank,
        "resume": True,
        "output_dir": files.directory,
        "save_prefix": files.prefix,
    }
    name = f"rank {rank}" if len(seeds_of(config)) == 1 else f"rank {rank}, seed {seed}"
    return launch.Task(name, (sys.executable, str(TRAINER), *cli.to_arguments(settings)), files.log)


def check_folder(files: results.SweepFiles, settings: dict, overwrite: bool) -> None:
    """Refuse a folder that holds another study; with `overwrite`, clear away what is there.

    Raises:
        ValueError: naming every setting that differs.
    """
    present = results.find_runs(files.directory)
    if present or files.config.exists() or files.summary_csv.exists():
        before = (results.read_json(files.config) or {}).get("settings")
        if before is None:
            difference = f"results of something else (no readable {files.config.name})"
        else:
            changed = resume.changes(before, settings)
            difference = f"another study ({changed})" if changed else None
        if difference and not overwrite:
            raise ValueError(f"{files.directory} holds {difference}; choose another --output_dir or give --overwrite")
    if overwrite:
        for rank, seed in present:
            run = results.rank_files(files.directory, rank, seed)
            run.remove()
            run.log.unlink(missing_ok=True)


def prepare(
    config, problem: Problem, plan: Plan, ranks: list[int], seeds: list[int], files: results.SweepFiles
) -> None:
    """Claim the results folder for this study: settings recorded, run folders made, old summary and figures removed.

    Raises:
        ValueError: the folder holds another study.
    """
    settings = resume.settings_of(config, problem) | {"seed": seeds[0]}
    check_folder(files, settings, config.overwrite)
    files.remove_outputs()
    for rank in ranks:
        for seed in seeds:
            results.prepare_output_dir(run_files(files.directory, rank, seed, seeds[0]).directory)
    results.write_json(
        files.config,
        {
            "settings": settings,
            "ranks": ranks,
            "seeds": seeds,
            "title": title_of(config, problem),
            "arguments": vars(config),
            "problem": problem.describe(),
            "provenance": results.provenance(),
        },
    )
    results.write_csv(files.floor_csv, results.FLOOR_COLUMNS, plan.curve_rows())


def slots_of(config, problem: Problem, runs: int) -> list[dict[str, str]]:
    """Environments of the places where trainings run at the same time.

    Raises:
        ValueError: --gpus names what is not there, or is given for another device.
    """
    jobs, cores = None if config.jobs == "auto" else config.jobs, launch.cpu_cores()
    if problem.device.type == "cpu":
        if config.gpus not in ("auto", "none"):
            raise ValueError(f"--gpus {config.gpus}: the device is {problem.device}; leave it out or use --device cuda")
        return launch.cpu_slots(jobs, runs, cores)
    if problem.device.index is not None:  # the trainings are given --device as it is
        if config.gpus != "auto":
            raise ValueError(f"--gpus {config.gpus} together with --device {config.device}: give one or the other")
        return launch.cpu_slots(min(jobs or runs, config.runs_per_gpu), runs, cores)
    gpus = launch.choose_gpus(config.gpus, torch.cuda.device_count())
    return launch.gpu_slots(gpus, config.runs_per_gpu, jobs, runs, cores)


def launcher_of(config, problem: Problem, runs: int, held: contextlib.ExitStack) -> Callable:
    """A launcher with all that it needs but the tasks and what to call while they run.

    Args:
        runs: trainings there are at most.
        held: keeps the connection to a cluster.
    Raises:
        ValueError: places that are not there.
    """
    if config.launcher == "local":
        return partial(launch.run_local, slots=slots_of(config, problem, runs), timeout=config.timeout_per_rank)
    if config.gpus not in ("auto", "none") or problem.device.index is not None:
        raise ValueError("--launcher ray chooses GPUs itself: give no --gpus but none, and no number in --device")
    weight_path = Path(config.weight_path).absolute()
    ray = held.enter_context(launch_ray.connected(config.ray_address, TRAINER))
    on_gpus = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    return partial(
        launch_ray.run_ray,
        ray=ray,
        inputs={str(weight_path): (f"{weight_path.stem}.pth", packed(problem.weight, config.transpose))},
        resources={"num_cpus": 1, "num_gpus": 1 / config.runs_per_gpu if on_gpus else 0},
        jobs=None if config.jobs == "auto" else config.jobs,
        timeout=config.timeout_per_rank,
    )


def title_of(config, problem: Problem) -> str:
    name = " ".join(filter(None, [Path(config.weight_path).name, problem.weight.key]))
    return f"{name}, {problem.rows} × {problem.cols}: {problem.chain.describe()}"


def status_of(files: results.RunFiles, outcome: launch.Outcome, num_epochs: int) -> str:
    """'ok', or what went wrong."""
    reported = (results.read_json(files.training_log) or {}).get("status")
    if outcome.timed_out:
        return "timed out"
    if outcome.returncode == cli.EXIT_OK and resume.is_finished(files, num_epochs):
        return "ok"
    if outcome.returncode == cli.EXIT_FAILED and reported in ("diverged", "out of memory"):
        return reported
    return f"failed (exit {outcome.returncode})"


def sweep(config, ranks: list[int], seeds: list[int], output_dir: Path, launcher: Callable) -> list[dict]:
    """Train every rank with every seed that is not finished yet, the largest first, also when others fail.

    Returns:
        rows of `ks.results.RUN_COLUMNS`; runs that an interrupt kept from finishing have the status 'interrupted'.
    """
    runs = {}
    for rank in ranks:
        for seed in seeds:
            files = run_files(output_dir, rank, seed, seeds[0])
            runs[make_task(config, rank, seed, files)] = (rank, seed, files)
    statuses = dict.fromkeys(runs, "interrupted")  # or never started, until the outcome is known
    waiting = []
    for task, (_, _, files) in runs.items():
        if resume.is_finished(files, config.num_epochs):
            statuses[task] = "ok"
            cli.note(f"{task.name}: finished before", config.quiet)
            continue
        waiting.append(task)
        if not files.resume.exists():
            files.log.unlink(missing_ok=True)
    waiting.sort(key=lambda task: (-runs[task][0], runs[task][1]))

    def epochs_done(task):
        return len(results.curves_if_any(runs[task][2].curves_csv))

    progress = Progress(len(waiting), config.num_epochs, epochs_done, config.quiet)
    try:
        for task, outcome in launcher(waiting, poll=progress.poll):
            statuses[task] = status_of(runs[task][2], outcome, config.num_epochs)
            progress.end(outcome_message(task, outcome, statuses[task], runs[task][2]))
    except KeyboardInterrupt:
        cli.note("stopping", config.quiet)
    finally:
        progress.close()
    rows = []
    for task, (rank, seed, files) in runs.items():
        curves, log = results.curves_if_any(files.curves_csv), results.read_json(files.training_log) or {}
        rows.append(summary.run_row(rank, curves, statuses[task], seed=seed, train_seconds=log.get("train_seconds")))
    return rows


def outcome_message(task: launch.Task, outcome: launch.Outcome, status: str, files: results.RunFiles) -> str:
    """How a run ended; after a failure, with the end of its log."""
    curves = results.curves_if_any(files.curves_csv)
    loss = f", validation loss {curves[-1]['val_loss']:.6g}" if curves else ""
    message = f"{task.name}: {status}{loss}, {outcome.seconds:.1f} s"
    if status == "ok":
        return message
    tail = task.log.read_text(errors="replace").splitlines()[-15:]
    return "\n  ".join([f"{message}; end of {task.log}:", *tail])


def conclude(config, problem: Problem, files: results.SweepFiles, ranks: list[int], floors: list, runs: list) -> None:
    """Write summary and figures of this sweep's ranks, and no others; print the summary and what to do next.

    Raises:
        AssertionError: a population loss below its floor, which would be a fault in here; after all is written.
    """
    finished = [run for run in runs if run["status"] == "ok"]
    if any(run["population_loss"] is None for run in finished):
        cli.note("floors are left out: the criterion is not the mean squared error", config.quiet)
        floors = [None] * len(ranks)
    first_seed = runs[0]["seed"]

    def curves_of(run):
        return run_files(files.directory, run["rank"], run["seed"], first_seed).curves_csv

    runs_of = {rank: [run for run in runs if run["rank"] == rank] for rank in ranks}
    predict_zero = problem.predict_zero_loss
    rows = [summary.rank_row(runs_of[rank], problem.chain, floor, predict_zero) for rank, floor in zip(ranks, floors)]
    results.write_csv(files.runs_csv, results.RUN_COLUMNS, runs)
    curves = [
        row
        for run in runs
        for row in results.all_curves_rows(run["rank"], run["seed"], results.curves_if_any(curves_of(run)))
    ]
    results.write_csv(files.all_curves_csv, results.ALL_CURVES_COLUMNS, curves)
    results.write_summary(files, rows)
    look = {"log_scale": config.log_scale, "title": config.title, "figsize": config.figsize}
    figures = plots.save_figures(plots.study_figures(read_study(files), **look), files, config.formats, config.dpi)
    print("\n".join([report.summary_table(rows), *summary.advice(rows, problem.sampling)]))
    print("\n".join(map(str, [files.summary_csv, *figures])))
    floor_of = dict(zip(ranks, floors))
    for run in finished:
        summary.check_above_floor(run["population_loss"], floor_of[run["rank"]], predict_zero)


def exit_code(runs: list[dict]) -> int:
    statuses = [run["status"] for run in runs]
    if "interrupted" in statuses:
        return cli.EXIT_INTERRUPTED
    if "ok" not in statuses:
        return cli.EXIT_FAILED
    return cli.EXIT_OK if set(statuses) == {"ok"} else cli.EXIT_SOME_FAILED


def main(argv=None) -> int:
    cli.interrupt_on_signals()
    config = build_parser().parse_config(argv)
    if config.gpus == "none" and config.device == "auto":
        config = dataclasses.replace(config, device="cpu")
    seeds = seeds_of(config)
    with contextlib.ExitStack() as held:
        with cli.usage_errors(SCRIPT):
            problem = resolve(config)
            if problem.rows * problem.cols > 2**22:
                cli.note(f"computing the floors of {problem.rows} × {problem.cols}", config.quiet)
            weight = problem.weight.tensor.to(problem.device)
            plan = make_plan(weight, problem.chain, problem.predict_zero_loss)
            ranks = ranks_of(config, plan)
            floors = plan.floors(ranks)
            plan_notes = report.plan_notes(plan, config.target_relative_loss)
            if not config.dry_run:
                launcher = launcher_of(config, problem, len(ranks) * len(seeds), held)
                files = results.SweepFiles(results.prepare_output_dir(config.output_dir), config.save_prefix)
                held.enter_context(locked(files.lock, "another sweep"))
                prepare(config, problem, plan, ranks, seeds, files)
        for text in problem.notes:
            cli.note(text, config.quiet)
        if config.dry_run:
            show_plan(config, problem, plan_notes, ranks, seeds, floors)
            return cli.EXIT_OK
        for text in plan_notes:
            cli.note(text, config.quiet)
        try:
            runs = sweep(config, ranks, seeds, files.directory, launcher)
            conclude(config, problem, files, ranks, floors, runs)
        except OSError as error:
            place = error.filename or files.directory
            print(f"{SCRIPT}: {error.strerror}: {place}; mend that and run the same command again", file=sys.stderr)
            return cli.EXIT_FAILED
    return exit_code(runs)


def show_plan(config, problem: Problem, notes: list[str], ranks: list[int], seeds: list[int], floors: list) -> None:
    """Floors, saturation and parity of the ranks, and the commands that would train them."""
    print("\n".join(notes))
    print(report.plan_table(problem.chain, ranks, floors, problem.predict_zero_loss))
    for rank in ranks:
        for seed in seeds:
            run = run_files(Path(config.output_dir).absolute(), rank, seed, seeds[0])
            print(shlex.join(make_task(config, rank, seed, run).command))


if __name__ == "__main__":
    sys.exit(main())
