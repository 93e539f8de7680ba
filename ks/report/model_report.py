"""The report of a study of a checkpoint: its plan, and the chains that were trained, beside each other on one page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ks.errors import UsageError
from ks.files.atomic import read_json_object
from ks.files.columns import MEASURED_PLANS, SUMMARY, TRAINED_LAYERS, chosen
from ks.files.layout import SweepFiles, layer_folder
from ks.files.schema import StudyRecord
from ks.files.status import ended_well
from ks.files.table import cell
from ks.model.model_plan import ModelPlan
from ks.report import page
from ks.report.figures.by_prediction import points_of
from ks.report.figures.draw import plans_figure
from ks.report.figures.parts import Sheet
from ks.report.html import (
    GLOSSARY,
    GLOSSARY_OF_ENERGY,
    GLOSSARY_OF_INCREASES,
    GLOSSARY_OF_LOSSES,
    ending,
    file_name,
    inline_svg,
)
from ks.report.read_results import Study, read_study
from ks.report.sentences import first_of, listed, of_failures
from ks.report.summary import summary_columns
from ks.report.verdict import Limit
from ks.report.words import Words, percents, significant

GOAL = ("budget", "target_relative_loss", "target_loss_increase", "chains", "chain", "rank_multiple", "loss_metric")
CAPTION = "Measured against predicted increases of the loss of the model, of plans and of equal fractions."
BOTH_ARE_PREDICTED = (
    "Planned: by the best chain that is known without training. Trained: by the chain that the run ended with. Both "
    "are predicted for each layer on its own; ks.compare measures the loss of the whole model."
)


def measured_plans(folder: Path) -> dict[str, ModelPlan]:
    """Return the plans in a folder whose predicted and measured increase are known, by the name of the file.

    Raises:
        UsageError: one of them is not valid, or they are of different losses.
    """
    paths = [path for path in sorted(folder.glob("*_plan.json")) if read_json_object(path).get("measured_increase")]
    plans = {path.name: plan for path in paths if points_of(plan := ModelPlan.load(path))}
    if len({plan.unit for plan in plans.values()}) > 1:
        raise UsageError(f"the measured plans in {folder} are of different losses, which do not compare")
    return plans


def write_model_report(source: SweepFiles, target: SweepFiles, drawn: Sheet | None = None) -> None:
    """Write the report of a study of a checkpoint.

    Args:
        source: files of the study; those of its layers are in folders below.
        target: to write into; the page links to the pages of the layers if these are below its folder.
        drawn: the figure of the measured plans in the folder; if None, it is drawn where there are any.
    Raises:
        UsageError: a file of the study is not valid.
    """
    study = read_study(source)
    config = study.config
    assert config is not None
    measured, remarks = measured_plans(source.directory), []
    plan = ModelPlan.load(source.plan_json) if source.plan_json.exists() else None
    if plan is not None and _goal(config.arguments) != _goal(read_json_object(source.plan_record).get("arguments")):
        remarks = [f"{source.plan_json.name} was made for another goal than these runs, and is left out."]
        plan = None
    if weak := [f"{row['weight_key']}, rank {row['rank']}" for row in study.rows if _is_undertrained(row)]:
        remarks.append(f"Undertrained: {first_of(weak)}. Increase --num_epochs.")
    pages = {name: layer_folder(source.directory, name) / source.report.name for name in config.layers}
    links = {name: address for name, path in pages.items() if (address := page.link(target.report, path))}
    unit = Words(unit=study.words.unit or (plan.unit if plan else "")).axis_unit
    if plan is None:
        layers = _ranks(study, study.rows, links)
    else:
        rows = _layer_rows(plan, study.rows)
        failed = not all(ended_well(row["status"]) for row in study.rows)
        shown = [column for column in TRAINED_LAYERS if column.name != "status" or failed]
        note = f'<p class="soft">{BOTH_ARE_PREDICTED}</p>'
        layers = page.table(shown, [*_marked(plan, rows), _total(plan, rows)], unit, links) + note
    planned = [(layer.layer, layer.rank) for layer in plan.layers] if plan else []
    others = [row for row in study.rows if planned and (row["weight_key"], row["rank"]) not in planned]
    figures = []
    if measured:
        figure = page.figure(inline_svg(drawn or plans_figure([*measured.values()]), "plans"), CAPTION)
        figures = [page.table(MEASURED_PLANS, _pairs(measured), unit), page.figures([figure])]
    sections = [
        ("Layers", layers),
        ("Other ranks", _ranks(study, others, links) if others else ""),
        ("Measured increase of the loss of the model", "".join(figures)),
        ("Model", page.definitions(_model(config, study))),
        ("Glossary", page.definitions(_glossary(study, plan))),
        *ending(config),
    ]
    name = f"{file_name(config, 'weight_path')}: {len(config.layers)} weights"
    first, *more = findings(study, plan)
    page.write_page(target.report, name, [first, *remarks, *more], sections)


def _ranks(study: Study, rows: list[dict], links: dict[str, str]) -> str:
    """Return the table of some rows of the summary, with the name of the layer also if there is one alone."""
    shown = {column.name: column for column in [*chosen(SUMMARY, ("weight_key",)), *summary_columns(rows)]}
    return page.table([*shown.values()], rows, study.words.axis_unit, links)


def _is_undertrained(row: dict) -> bool:
    return str(row["verdict"]).split(", ")[0] == Limit.TRAINING


def _goal(arguments: Any) -> list[Any]:
    """Return the flags that choose a plan, as a record has them."""
    return [arguments.get(name) for name in GOAL] if isinstance(arguments, dict) else []


def findings(study: Study, plan: ModelPlan | None) -> list[str]:
    """Return what was trained, runs that failed first, and the sentences of the plan."""
    sentences = of_failures((row["weight_key"], row) for row in study.rows)
    if sentences:
        sentences.append("The folder of each rank has the train.log of its runs.")
    if plan is None:
        layers, ranks = ({row[name] for row in study.rows} for name in ("weight_key", "rank"))
        return [*sentences, f"{len(layers)} layers, at {listed(sorted(ranks), 0)}."]
    warning, rows = plan.sentences()[:1] if plan.is_misjudged else [], _layer_rows(plan, study.rows)
    total, size = _total(plan, rows), f"with {plan.share:.2%} of the parameters of {len(plan.layers)} weights"
    if total["trained_increase"] is not None:
        planned, found = significant(total["planned_increase"], total["trained_increase"])
        unit = Words(unit=plan.unit).axis_unit
        sentences.append(
            f"The trained chains are predicted to cost the model {found} {unit}, {size}; the plan predicts {planned}."
        )
    elif total["trained_energy_loss"] is not None:
        planned, found = percents(total["planned_energy_loss"], total["trained_energy_loss"])
        sentences.append(
            f"The trained chains lose {found} of the output energy on average, {size}; the plan predicts {planned}."
        )
    return [*warning, *sentences, *(text for text in plan.sentences() if text not in warning)]


def _layer_rows(plan: ModelPlan, rows: list[dict]) -> list[dict[str, Any]]:
    """Return a row for each layer of a plan, with the losses of the chain that was trained for it."""
    trained = {(row["weight_key"], row["rank"]): row for row in rows}
    found = []
    for layer in plan.layers:
        row = trained.get((layer.layer, layer.rank), {})
        increases = {"planned_increase": layer.loss_increase, "trained_increase": row.get("loss_increase")}
        energy = row.get("energy_loss")
        energies = {
            "planned_energy_loss": layer.relative_loss,
            "trained_energy_loss": row.get("relative_loss") if energy is None else energy,
        }
        if layer.chain is None:
            increases["trained_increase"], energies["trained_energy_loss"] = layer.loss_increase, 0.0
        found.append(
            {"layer": layer.layer, "chain": layer.family, "rank": layer.rank, "share": layer.share}
            | increases
            | energies
            | {name: row.get(name) for name in ("status", "verdict", "train_seconds")}
        )
    return found


def _marked(plan: ModelPlan, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of `_layer_rows`, with ~ before the planned losses that are interpolated."""
    planned = chosen(TRAINED_LAYERS, ("planned_increase", "planned_energy_loss"))
    for layer, row in zip(plan.layers, rows):
        known = [column for column in planned if layer.interpolated and row[column.name] is not None]
        yield row | {column.name: f"~{cell(column, row[column.name])}" for column in known}


def _total(plan: ModelPlan, rows: list[dict]) -> dict[str, Any]:
    """Return the row below those of the layers; a sum or mean is known if all its parts are."""
    total: dict[str, Any] = {"layer": "all: sum of increases, mean of energies", "share": plan.share}
    for name in ("planned_increase", "trained_increase", "planned_energy_loss", "trained_energy_loss"):
        values = [row[name] for row in rows]
        parts = 1 if name.endswith("increase") else len(values)
        total[name] = None if None in values else sum(values) / parts
    return total


def _pairs(plans: dict[str, ModelPlan]) -> list[dict[str, Any]]:
    """Return a row for each predicted increase that was measured."""
    return [
        {
            "plan": file if name == "plan" else f"{file}: the same fraction in every layer",
            "share": (plan if name == "plan" else plan.as_uniform()).share,
            "predicted_increase": predicted,
            "measured_increase": measured,
            "measured_over_predicted": measured / predicted if predicted else None,
        }
        for file, plan in plans.items()
        for name, (predicted, measured) in plan.increases().items()
    ]


def _model(config: StudyRecord, study: Study) -> dict[str, str | None]:
    return {
        "checkpoint": str(config.settings.get("checkpoint")),
        "inputs": file_name(config, "inputs") or "isotropic; the inputs of a real layer differ",
        "plan and runs minimise": "the loss of the model" if study.words.of_model else "the output energy that is lost",
        "unit of the loss": study.words.unit,
        "seeds": " ".join(map(str, config.seeds)),
    }


def _glossary(study: Study, plan: ModelPlan | None) -> dict[str, str]:
    glossary = {name: GLOSSARY[name] for name in ("rank", "chain")}
    glossary["share"] = "parameters of the chain, as a fraction of those of the dense weight"
    if plan is None:
        glossary |= GLOSSARY_OF_LOSSES | ({} if study.words.of_model else GLOSSARY_OF_ENERGY)
    glossary |= {"energy loss": GLOSSARY_OF_INCREASES["energy loss"]}
    if study.summary["loss_increase"].notna().any() or (plan and plan.loss_increase is not None):
        glossary["increase"] = GLOSSARY_OF_INCREASES["loss increase"].format(unit=study.words.in_unit)
    return glossary
