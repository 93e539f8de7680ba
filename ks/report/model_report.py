"""The report of a study of a checkpoint: its plan, and the chains that were trained, beside each other on one page."""

from collections.abc import Mapping
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
from ks.report.figures.draw import inline_svg
from ks.report.figures.parts import Sheet
from ks.report.read_results import Study
from ks.report.sentences import first_of, of_failures
from ks.report.summary import summary_columns
from ks.report.verdict import Limit, parts_of
from ks.report.weight_report import CAPTIONS, GLOSSARY, OF_LOSSES, ending, file_name
from ks.report.words import Words, percents, significant

GOAL = ("budget", "target_relative_loss", "target_loss_increase", "chains", "chain", "rank_multiple", "loss_metric")
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


def write_model_report(
    study: Study, files: SweepFiles, measured: Mapping[str, ModelPlan], drawn: Mapping[str, Sheet]
) -> None:
    """Write the report of a study of a checkpoint.

    Args:
        study: read from its files; those of its layers are in folders below.
        files: to write into; the page links to the pages of the layers if these are below its folder.
        measured: of `measured_plans`.
        drawn: figures by name, of which their one is shown.
    Raises:
        UsageError: a plan of the study is not valid.
    """
    config, source, rows = study.config, study.files, study.rows
    plan, remarks = ModelPlan.load(source.plan_json) if source.plan_json.exists() else None, []
    planned_for = read_json_object(source.plan_record).get("arguments") or {}
    if plan is not None and any(config.arguments.get(flag) != planned_for.get(flag) for flag in GOAL):
        remarks.append(f"{source.plan_json.name} was made for another goal than these runs, and is left out.")
        plan = None
    if weak := [row for row in rows if Limit.TRAINING in parts_of(row)]:
        names = first_of([f"{row['weight_key']}, rank {row['rank']}" for row in weak])
        remarks.append(f"Undertrained: {names}. Increase --num_epochs.")
    first, *more = findings(study, plan)
    pages = {name: layer_folder(source.directory, name) / source.report.name for name in config.layers}
    links = page.links(files.report, pages)
    unit = Words(unit=study.words.unit or (plan.unit if plan else "")).axis_unit
    # The name of the layer is a column also if there is one layer alone.
    of_summary = {column.name: column for column in [*chosen(SUMMARY, ("weight_key",)), *summary_columns(rows)]}
    layers, beside = "", rows
    if plan is not None:
        ended_badly = any(not ended_well(row["status"]) for row in rows)
        shown = [column for column in TRAINED_LAYERS if column.name != "status" or ended_badly]
        layers = page.table(shown, _layer_rows(plan, rows), unit, links)
        layers += f'<p class="soft">{BOTH_ARE_PREDICTED}</p>'
        planned = [(layer.layer, layer.rank) for layer in plan.layers]
        beside = [row for row in rows if (row["weight_key"], row["rank"]) not in planned]
    figures = [(inline_svg(drawn["plans"], "plans"), CAPTIONS["plans"])] if "plans" in drawn else []
    increases = page.table(MEASURED_PLANS, _pairs(measured), unit) + page.figures(figures)
    sections = [
        ("Layers", layers),
        ("Other ranks" if plan else "Layers", page.table([*of_summary.values()], beside, unit, links)),
        ("Measured increase of the loss of the model", increases),
        ("Model", page.definitions(_model(config, study))),
        ("Glossary", page.definitions(_glossary(study, plan))),
        *ending(config),
    ]
    name = f"{file_name(config, 'weight_path')}: {len(config.layers)} weights"
    page.write_page(files.report, name, [first, *remarks, *more], sections)


def findings(study: Study, plan: ModelPlan | None) -> list[str]:
    """Return what was trained, runs that failed first, and the sentences of the plan."""
    sentences = of_failures((row["weight_key"], row) for row in study.rows)
    if sentences:
        sentences.append("The folder of each rank has the train.log of its runs.")
    if plan is None:
        layers, ranks = ({row[name] for row in study.rows} for name in ("weight_key", "rank"))
        listed = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
        return [*sentences, f"{len(layers)} layers, at {listed}."]
    warning, others = plan.sentences()[: plan.is_misjudged], plan.sentences()[plan.is_misjudged :]
    total, trained = _layer_rows(plan, study.rows)[-1], ""
    if total["trained_increase"] is not None:
        planned, found = significant(total["planned_increase"], total["trained_increase"])
        trained = f"are predicted to cost the model {found} {Words(unit=plan.unit).axis_unit}"
    elif total["trained_energy_loss"] is not None:
        planned, found = percents(total["planned_energy_loss"], total["trained_energy_loss"])
        trained = f"lose {found} of the output energy on average"
    if trained:
        size = f"{plan.share:.2%} of the parameters of {len(plan.layers)} weights"
        sentences.append(f"The trained chains {trained}, with {size}; the plan predicts {planned}.")
    return [*warning, *sentences, *others]


def _layer_rows(plan: ModelPlan, rows: list[dict]) -> list[dict[str, Any]]:
    """Return a row for each layer of a plan, with the losses of the chain that was trained for it, and their total.

    A sum or mean is known if all its parts are. Planned losses that are interpolated have a ~ before them.
    """
    trained = {(row["weight_key"], row["rank"]): row for row in rows}
    found: list[dict[str, Any]] = []
    for layer in plan.layers:
        planned = {"planned_increase": layer.loss_increase, "planned_energy_loss": layer.relative_loss}
        row = trained.get((layer.layer, layer.rank), {})
        if layer.chain is None:
            row = {"loss_increase": layer.loss_increase, "relative_loss": layer.relative_loss}
        energy = row.get("energy_loss")
        found.append(
            {name: row.get(name) for name in ("status", "verdict", "train_seconds")}
            | layer.row()
            | planned
            | {
                "trained_increase": row.get("loss_increase"),
                "trained_energy_loss": row.get("relative_loss") if energy is None else energy,
            }
        )
    total: dict[str, Any] = {"layer": "all: sum of increases, mean of energies", "share": plan.share}
    for name, parts in (("increase", 1), ("energy_loss", len(found))):
        for column in (f"planned_{name}", f"trained_{name}"):
            values = [row[column] for row in found]
            total[column] = None if None in values else sum(values) / parts
    for layer, row in zip(plan.layers, found):
        for known in chosen(TRAINED_LAYERS, ("planned_increase", "planned_energy_loss")):
            if layer.interpolated and row[known.name] is not None:
                row[known.name] = f"~{cell(known, row[known.name])}"
    return [*found, total]


def _pairs(plans: Mapping[str, ModelPlan]) -> list[dict[str, Any]]:
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
    of_losses = OF_LOSSES if study.words.of_model else (*OF_LOSSES, "relative loss")
    terms = ["rank", "chain", *(() if plan else of_losses), "energy loss"]
    glossary = {term: GLOSSARY[term] for term in terms}
    glossary["share"] = "parameters of the chain, as a fraction of those of the dense weight"
    if study.summary["loss_increase"].notna().any() or (plan and plan.loss_increase is not None):
        glossary["increase"] = GLOSSARY["loss increase"].format(unit=study.words.in_unit)
    return glossary
