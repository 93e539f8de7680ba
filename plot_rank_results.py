"""Draw the figures of a rank sweep again, from its files alone; or several sweeps side by side in one figure.

    python plot_rank_results.py --results_dir ./rank_sweep_results --log_scale
    python plot_rank_results.py --results_dir ./monarch_results ./lowrank_results --output_dir ./figures

Reads rank_R/rank_R_rank_R_loss_curves.csv (those of the 2025 scripts too) and, where they are, PREFIX_summary.json
(which then says what ranks belong to the study), PREFIX_floor.csv and PREFIX_config.json. Writes PREFIX_loss_curves,
PREFIX_final_losses and PREFIX_floor to --output_dir and prints the summary; for several sweeps, PREFIX_chains.
Exit codes: 0 well, 2 bad input.
"""

import sys
from pathlib import Path

from ks import cli, plots, report, results
from ks.study import read_study

SCRIPT = "plot_rank_results.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("--results_dir", required=True, nargs="+", help="folder of a sweep, or of several to compare")
    parser.add_argument("--show", action="store_true", help="open windows, too")
    cli.add_output_flags(parser, output_dir=None, save_prefix="rank_sweep")
    cli.add_plot_flags(parser)
    return parser


def main(argv=None) -> int:
    config = build_parser().parse_config(argv)
    look = {"log_scale": config.log_scale, "title": config.title, "figsize": config.figsize}
    with cli.usage_errors(SCRIPT):
        sources = [Path(path).absolute() for path in config.results_dir]
        if len(sources) > 1 and config.output_dir is None:
            raise ValueError("several --results_dir need an --output_dir for their common figure")
        studies = [read_study(results.SweepFiles(source, config.save_prefix)) for source in sources]
        if len({study.weight_sha256 for study in studies}) > 1:
            raise ValueError("the --results_dir are studies of different weights: their losses do not compare")
        if len(studies) > 1:
            figures = {"chains": plots.chains(studies, **look)}
        else:
            figures = plots.study_figures(studies[0], **look)
        target = results.prepare_output_dir(config.output_dir or sources[0])
        written = plots.save_figures(
            figures, results.SweepFiles(target, config.save_prefix), config.formats, config.dpi
        )
        for study in studies:
            if len(studies) > 1:
                print(f"{study.name}: {study.chain}")
            print(report.summary_table(study.summary.to_dict("records")))
        for path in written:
            print(path)
        if config.show:
            plots.show(list(figures.values()))
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
