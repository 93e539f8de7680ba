"""The report of several studies: machines, families, seeds or layers beside each other on one page."""

from collections.abc import Mapping, Sequence

from ks.files.columns import STUDIES, STUDIES_RUNS
from ks.files.layout import SweepFiles
from ks.report import page
from ks.report.comparison import findings, shared_columns, study_row, what_compares
from ks.report.figures.draw import chains_figures, inline_svg
from ks.report.figures.parts import Sheet
from ks.report.read_results import Study
from ks.report.sentences import recommendation
from ks.report.weight_report import GLOSSARY, is_squashed, reproducing_command

CAPTION = "Points: trained ranks. Lines: no chain of this family and size can have a smaller loss."
TERMS = {
    **{name: GLOSSARY[name] for name in ("rank", "chain")},
    "relative loss": "the loss of a chain, as a fraction of that of the zero predictor on the same weight and inputs",
    "loss increase": "the increase of the loss of the model per token that is predicted to second order",
    "target": "the largest loss that the study was asked for",
    **{name: GLOSSARY[name] for name in ("zero predictor", "floor")},
}


def write_studies_report(
    studies: Sequence[Study], files: SweepFiles, drawn: Mapping[str, Sheet], *, log_scale: bool = False
) -> None:
    """Write the report of several studies.

    Args:
        studies: of `ks.report.comparison.read_studies`.
        files: to write into; the page links to the pages of studies whose folders are below its own.
        drawn: their figures, by name; those with linear axes that squash the losses are not shown.
        log_scale: whether they have logarithmic loss axes.
    """
    rows = [study_row(study) for study in studies]
    links = page.links(files.report, {study.name: study.files.report for study in studies})
    shared = shared_columns(rows)
    units = {study.words.axis_unit for study in studies if study.words.unit}
    hidden = {*shared} if any(study.words.of_model for study in studies) else {*shared, "energy_loss"}
    results, runs = ([column for column in shown if column.name not in hidden] for shown in (STUDIES, STUDIES_RUNS))
    if not log_scale and any(map(is_squashed, studies)):
        drawn = chains_figures(studies, log_scale=True)
    answers = [f"{study.name}: {sentences[0]}" for study in studies if (sentences := recommendation(study))]
    recorded = [(study.name, study.config) for study in studies if study.config.arguments]
    commands = [f"# {name}\n{reproducing_command(config)}\n" for name, config in recorded]
    figures = [(inline_svg(figure, name), _caption(name)) for name, figure in drawn.items()]
    sections = [
        ("Studies", page.table(results, rows, units.pop() if len(units) == 1 else "", links)),
        ("The same in every study", page.definitions({name.replace("_", " "): text for name, text in shared.items()})),
        ("What compares", page.items(what_compares(studies))),
        ("Figures", page.figures(figures)),
        ("The answer of each study", page.items(answers)),
        ("Runs, and where the time went", page.table(runs, rows)),
        ("Glossary", page.definitions(TERMS)),
        ("Commands that reproduce the studies", page.commands(commands)),
    ]
    page.write_page(files.report, f"{len(studies)} studies", findings(studies, rows), sections)


def _caption(name: str) -> str:
    """Return the caption of a figure; where there are several, with the kind of losses in it."""
    metric, _, inputs = name.removeprefix("chains").strip("_").rpartition("_")
    return f"{metric.replace('_', ' ').capitalize()}, {inputs} inputs. {CAPTION}" if metric else CAPTION
