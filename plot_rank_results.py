"""Draw the figures of a rank sweep again, from its files alone.

    python plot_rank_results.py --results_dir ./rank_sweep_results
    python plot_rank_results.py --results_dir ./rank_sweep_results --log_scale --formats png svg --output_dir ./figures

Reads rank_R/rank_R_rank_R_loss_curves.csv (those of the 2025 scripts too) and, where there is one, PREFIX_summary.csv,
which then says what ranks belong to the study. Writes PREFIX_loss_curves and PREFIX_final_losses to --output_dir and
prints the summary. Exit codes: 0 well, 2 bad input.
"""

import sys
from pathlib import Path

import pandas as pd

from ks import cli, plots, report, results

SCRIPT = "plot_rank_results.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("--results_dir", required=True, help="folder of a finished sweep")
    parser.add_argument("--show", action="store_true", help="open windows, too")
    cli.add_output_flags(parser, output_dir=None, save_prefix="rank_sweep")
    cli.add_plot_flags(parser)
    return parser


def read_study(files: results.SweepFiles) -> tuple[list[dict], list[dict]]:
    """The curves of all ranks, epoch by epoch, and the summary rows.

    Raises:
        ValueError: no such folder, no results in it, or a file that cannot be read.
    """
    if not files.directory.is_dir():
        raise ValueError(f"{files.directory}: no such folder")
    found = results.find_curves(files.directory)
    summary = results.read_json(files.summary_json)
    if not found and not summary:
        raise ValueError(f"{files.directory} holds no results (no rank_R/rank_R_rank_R_loss_curves.csv in it)")
    if summary:
        found = {row["rank"]: found[row["rank"]] for row in summary if row["rank"] in found}
    curves = {rank: results.read_curves(path) for rank, path in found.items()}
    rows = summary or [results.summarise(rank, run) for rank, run in curves.items()]
    return [epoch for run in curves.values() for epoch in run], rows


def main(argv=None) -> int:
    config = build_parser().parse_config(argv)
    with cli.usage_errors(SCRIPT):
        source = Path(config.results_dir).absolute()
        curves, rows = read_study(results.SweepFiles(source, config.save_prefix))
        target = results.SweepFiles(results.prepare_output_dir(config.output_dir or source), config.save_prefix)
        figures = plots.study_figures(
            pd.DataFrame(curves),
            pd.DataFrame(rows),
            log_scale=config.log_scale,
            title=config.title,
            figsize=config.figsize,
        )
        written = plots.save_figures(figures, target, config.formats, config.dpi)
        print(report.summary_table(rows))
        for path in written:
            print(path)
        if config.show:
            plots.show(list(figures.values()))
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
