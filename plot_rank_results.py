"""Draw the figures of a rank sweep again, from its files alone; or compare several sweeps.

    python plot_rank_results.py --results_dir ./rank_sweep_results --log_scale
    python plot_rank_results.py --results_dir ./monarch_results ./lowrank_results --output_dir ./figures --report

Reads rank_R/rank_R_rank_R_loss_curves.csv (those of the 2025 scripts too) and, where they are, PREFIX_summary.json
(which then lists the ranks of the study), PREFIX_floor.csv and PREFIX_config.json. Prints the answer and the
summary, and writes the figures PREFIX_loss_curves, _final_losses, _floor, _gap, _front and _latency to
--output_dir; with --metric NAME, also PREFIX_metric_NAME; with --report, also PREFIX_report.html. For several
sweeps, of one weight or of different ones, it draws PREFIX_chains, one figure for each kind of losses that compare.
For the plans of a model in the folder, *_plan.json, whose increase of the loss was measured, it draws PREFIX_plans.
If the figures are not those of a sweep in that folder, PREFIX_figures.json lists them.
Exit codes: 0 well, 2 bad input, 4 internal error.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, __file__.rpartition("/")[0])  # python -I and PYTHONSAFEPATH leave the folder of a script out

from ks.cli import console

if __name__ == "__main__":
    console.begin(__file__)

from ks.cli.flags import PlotConfig
from ks.cli.parser import Parser
from ks.errors import UsageError
from ks.files.atomic import prepare_output_dir, read_json_object, write_json
from ks.files.columns import STUDIES
from ks.files.layout import SweepFiles
from ks.files.ownership import check_free, delete, recorded
from ks.files.table import filled, table
from ks.report.comparison import findings, read_studies, study_row, what_compares
from ks.report.figures import draw
from ks.report.model_report import measured_plans, write_model_report
from ks.report.read_results import read_study
from ks.report.studies_report import write_studies_report
from ks.report.summary import summary_table
from ks.report.weight_report import write_report


def build_parser() -> Parser[PlotConfig]:
    return Parser(PlotConfig, __doc__)


def claim(files: SweepFiles, paths: list[Path], sources: list[Path]) -> None:
    """Check that figures can be written, and record those that no study in the folder has recorded.

    Figures of some of the same sources are replaced, so that a study can join.

    Raises:
        UsageError: a figure of another study, or a file of the user's, is in the way.
    """
    record = {"sources": [str(source) for source in sources], "files": [path.name for path in paths]}
    before = read_json_object(files.figures_record)
    owned = recorded(files.config, files.all()) if sources == [files.directory] else set()
    if not owned >= {*paths}:
        drawn = recorded(files.figures_record) if {*before.get("sources", ["?"])} <= {*record["sources"]} else set()
        check_free([*paths, files.figures_record], owned | drawn, [], "choose another --output_dir")
        if before.get("sources") != record["sources"]:
            delete(drawn)
        write_json(files.figures_record, record)


@console.script
def main(argv=None) -> int:
    config = build_parser().parse(argv)
    look: dict[str, Any] = {"log_scale": config.log_scale, "title": config.title}
    sources = [*dict.fromkeys(Path(path).absolute() for path in config.results_dir)]
    several = len(sources) > 1
    if several and not config.output_dir:
        raise UsageError("several --results_dir need an --output_dir for their common figure")
    if several and config.metric:
        raise UsageError("--metric needs a single --results_dir")
    try:
        given = [SweepFiles(source, config.save_prefix) for source in sources]
        plans = {} if several else measured_plans(sources[0])
        if several:
            studies = read_studies(given)
        else:
            studies = [read_study(given[0])] if not plans or config.report or given[0].summary_json.exists() else []
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error
    drawn = draw.plans_figures([*plans.values()], title=config.title)
    if several:
        drawn = draw.chains_figures(studies, **look)
        if not drawn and not config.report:
            raise UsageError(
                "the --results_dir have no relative losses and parameters; --report compares how they ended"
            )
    elif studies:
        if unknown := studies[0].unknown_metrics(config.metric):
            raise UsageError(unknown)
        drawn |= draw.study_figures(studies[0], metrics=config.metric, **look)
    target = prepare_output_dir(config.output_dir or sources[0])
    files = SweepFiles(target, config.save_prefix)
    paths = [files.figure(name, suffix) for name in drawn for suffix in config.formats]
    try:
        claim(files, [*paths, *([files.report] if config.report else [])], sources)
        written = draw.save_figures(drawn, files, config.formats, config.dpi)
        if config.report:
            if several:
                write_studies_report(studies, files, drawn, log_scale=config.log_scale)
            elif studies[0].config.layers:
                write_model_report(studies[0], files, plans, drawn)
            else:
                write_report(studies[0], files, drawn, log_scale=config.log_scale)
            written.append(files.report)
    except OSError as error:
        raise UsageError(f"figures cannot be written to {target}: {error.strerror}") from error
    explained: set[str] = set()
    for plan in plans.values():
        print("\n".join(filled(plan.sentences())) + "\n")
    if several:
        rows = [study_row(study) for study in studies]
        print("\n".join(filled(findings(studies, rows))) + "\n")
        print(table(STUDIES[:7], rows, explained=explained) + "\n")
        print("\n".join(filled(what_compares(studies))))
    for study in studies:
        if several:
            print(f"\n{study.name}: {study.config.problem.chain}")
        if study.config.answer:
            print("\n".join(filled(study.config.answer)) + "\n")
        print(summary_table(study.rows, config.verbose, explained))
    for path in written:
        print(path)
    if config.show:
        draw.show(list(drawn.values()))
    return console.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
