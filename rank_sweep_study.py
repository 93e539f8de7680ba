"""Sweep the rank of a Kronecker-sparse chain: one training per rank, each in a process of its own, then compare.

    python rank_sweep_study.py --weight_path my_weight.pth --ranks 2 4 8 16 --log_scale
    python rank_sweep_study.py --weight_path my_weight.pth --dry_run

Written to --output_dir: a folder rank_R for each rank (curves, checkpoints, train.log), and under --save_prefix
PREFIX_summary.csv and .json, PREFIX_loss_curves.png, PREFIX_final_losses.png, PREFIX_config.json.
Exit codes: 0 well, 1 no rank succeeded, 2 bad input or another study's folder, 3 some ranks failed, 130 interrupted.
"""

import shlex
import signal
import sys
from pathlib import Path

import pandas as pd

from ks import cli, launch, plots, report, results
from ks.problem import Problem, resolve
from ks.progress import Progress

SCRIPT = "rank_sweep_study.py"
TRAINER = Path(__file__).resolve().parent / "train_with_random.py"
DEFAULT_RANKS = [2, 4, 8, 16, 32, 64, 128, 256, 512]
# Where the weight lies (its hash says what it is) and how much is reported do not make another study.
NOT_COMPARED = ("weight_path", "weight_key", "transpose", "log_interval", "verbose", "quiet", "save_interval")


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    # The brief's rank folder holds no epoch checkpoints: none unless asked for.
    cli.add_shared_training_groups(parser, num_epochs=50, save_interval=0)
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--ranks",
        type=cli.positive_int,
        nargs="+",
        default=DEFAULT_RANKS,
        help=f"ranks to train (default: {' '.join(map(str, DEFAULT_RANKS))})",
    )
    group.add_argument("--max_rank", type=cli.positive_int, help="leave out larger ranks")
    group.add_argument("--dry_run", action="store_true", help="print the plan and the commands, train nothing")
    group.add_argument("--overwrite", action="store_true", help="replace another study in --output_dir")
    cli.add_output_flags(parser, output_dir="./rank_sweep_results", save_prefix="rank_sweep")
    cli.add_plot_flags(parser)
    return parser


def ranks_of(config) -> list[int]:
    """The ranks to train: ascending, each once, none above --max_rank."""
    ranks = sorted({rank for rank in config.ranks if config.max_rank is None or rank <= config.max_rank})
    if not ranks:
        given = " ".join(map(str, config.ranks))
        raise ValueError(f"no rank is left: --max_rank {config.max_rank} excludes all of {given}")
    return ranks


def make_task(config, rank: int, output_dir: Path) -> launch.Task:
    """The training of one rank as a process: absolute paths, this interpreter, its output into train.log."""
    files = results.rank_files(output_dir, rank)
    settings = cli.shared_settings(config) | {
        "weight_path": Path(config.weight_path).absolute(),
        "rank": rank,
        "output_dir": files.directory,
        "save_prefix": files.prefix,
    }
    return launch.Task(rank, (sys.executable, str(TRAINER), *cli.to_arguments(settings)), files.log)


def check_folder(files: results.SweepFiles, settings: dict, overwrite: bool) -> None:
    """Refuse a folder that holds another study; with `overwrite`, clear that study's rank files away.

    Raises:
        ValueError: naming every setting that differs.
    """
    present = results.find_curves(files.directory)
    if not present and not files.config.exists() and not files.summary_csv.exists():
        return
    before = (results.read_json(files.config) or {}).get("settings")
    if before is None:
        difference = f"results of something else (no readable {files.config.name})"
    else:
        changed = [name for name, value in results.finite(settings).items() if value != before.get(name)]
        if not changed:
            return
        changes = ", ".join(f"{name} was {before.get(name)}, now {settings[name]}" for name in changed)
        difference = f"another study ({changes})"
    if not overwrite:
        raise ValueError(f"{files.directory} holds {difference}; choose another --output_dir or give --overwrite")
    for rank in present:
        results.rank_files(files.directory, rank).remove()


def row_of(problem: Problem, output_dir: Path, rank: int, outcome: launch.Outcome | None) -> dict:
    """The summary row of a rank from its files; no outcome means that it was interrupted or never started."""
    files = results.rank_files(output_dir, rank)
    parameters = problem.chain.parameters(rank)
    reported = (results.read_json(files.training_log) or {}).get("status")
    if outcome is None:
        status = "interrupted"
    elif outcome.returncode == cli.EXIT_OK and reported == "finished":
        status = "ok"
    elif outcome.returncode == cli.EXIT_FAILED and reported in ("diverged", "out of memory"):
        status = reported
    else:
        status = f"failed (exit {outcome.returncode})"
    row = results.summarise(
        rank,
        results.curves_if_any(files.curves_csv),
        status,
        parameters=parameters,
        share_of_dense=parameters / (problem.rows * problem.cols),
        train_seconds=outcome.seconds if outcome else None,
    )
    if row["final_val_loss"] is not None:
        row["relative_val_loss"] = row["final_val_loss"] / problem.predict_zero_loss
    return row


def sweep(config, problem: Problem, ranks: list[int], output_dir: Path) -> list[dict]:
    """Train every rank, also when others fail.

    Returns:
        the summary rows, one per rank; ranks that an interrupt kept from finishing have the status 'interrupted'.
    """

    def epochs_done(rank):
        return len(results.curves_if_any(results.rank_files(output_dir, rank).curves_csv))

    progress = Progress(len(ranks), config.num_epochs, epochs_done, config.quiet)
    tasks = [make_task(config, rank, output_dir) for rank in ranks]
    rows = []
    try:
        for task, outcome in launch.run_local(tasks, lambda task: progress.poll(task.rank)):
            rows.append(row_of(problem, output_dir, task.rank, outcome))
            progress.end(outcome_message(rows[-1], task))
    except KeyboardInterrupt:
        rows += [row_of(problem, output_dir, rank, None) for rank in ranks[len(rows) :]]
    finally:
        progress.close()
    return rows


def outcome_message(row: dict, task: launch.Task) -> str:
    loss = "no loss" if row["final_val_loss"] is None else f"validation loss {row['final_val_loss']:.6g}"
    message = f"rank {task.rank}: {row['status']}, {loss}, {row['train_seconds']:.1f} s"
    if row["status"] == "ok":
        return message
    tail = task.log.read_text(errors="replace").splitlines()[-15:]
    return "\n  ".join([f"{message}; end of {task.log}:", *tail])


def write_outputs(config, problem: Problem, files: results.SweepFiles, rows: list[dict]) -> list[Path]:
    """Write summary and figures of this sweep's ranks, and no others.

    Returns:
        the files written.
    """
    results.write_summary(files, rows)
    name = " ".join(filter(None, [Path(config.weight_path).name, problem.weight.key]))
    curves = [results.curves_if_any(results.rank_files(files.directory, row["rank"]).curves_csv) for row in rows]
    figures = plots.study_figures(
        pd.DataFrame([epoch for run in curves for epoch in run]),
        pd.DataFrame(rows),
        log_scale=config.log_scale,
        title=config.title or f"{name}, {problem.rows} × {problem.cols}: {problem.chain.describe()}",
        figsize=config.figsize,
    )
    return [files.summary_csv, files.summary_json, *plots.save_figures(figures, files, config.formats, config.dpi)]


def exit_code(rows: list[dict]) -> int:
    statuses = [row["status"] for row in rows]
    if "interrupted" in statuses:
        return cli.EXIT_INTERRUPTED
    if "ok" not in statuses:
        return cli.EXIT_FAILED
    return cli.EXIT_OK if set(statuses) == {"ok"} else cli.EXIT_SOME_FAILED


def interrupt(signum, frame):
    raise KeyboardInterrupt


def prepare(config, problem: Problem, ranks: list[int]) -> results.SweepFiles:
    """Claim the results folder for this study: settings recorded, rank folders made, an earlier run of it cleared.

    Raises:
        ValueError: the folder cannot be written, or holds another study.
    """
    files = results.SweepFiles(results.prepare_output_dir(config.output_dir), config.save_prefix)
    description = problem.describe()
    settings = {name: value for name, value in cli.shared_settings(config).items() if name not in NOT_COMPARED}
    settings["weight_sha256"] = description["weight"]["sha256"]
    check_folder(files, settings, config.overwrite)
    for rank in ranks:
        run_files = results.rank_files(files.directory, rank)
        results.prepare_output_dir(run_files.directory)
        run_files.remove()
    results.write_json(
        files.config,
        {
            "settings": settings,
            "ranks": ranks,
            "arguments": vars(config),
            "problem": description,
            "provenance": results.provenance(),
        },
    )
    return files


def main(argv=None) -> int:
    signal.signal(signal.SIGTERM, interrupt)
    config = build_parser().parse_config(argv)
    with cli.usage_errors(SCRIPT):
        ranks = ranks_of(config)
        problem = resolve(config)
        files = None if config.dry_run else prepare(config, problem, ranks)
    for text in problem.notes:
        cli.note(text, config.quiet)
    if config.dry_run:
        print(report.plan_table(problem.chain, ranks))
        for rank in ranks:
            print(shlex.join(make_task(config, rank, Path(config.output_dir).absolute()).command))
        return cli.EXIT_OK
    rows = sweep(config, problem, ranks, files.directory)
    written = write_outputs(config, problem, files, rows)
    print(report.summary_table(rows))
    for path in written:
        print(path)
    bad = [f"{row['rank']} {row['status']}" for row in rows if row["status"] != "ok"]
    if bad:
        print(f"{SCRIPT}: {len(bad)} of {len(rows)} ranks did not finish: {', '.join(bad)}", file=sys.stderr)
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
