"""Several studies beside each other: which of them compare, a row for each, and sentences on both."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from math import log
from typing import Any

from ks.files import columns
from ks.files.columns import ISOTROPIC
from ks.files.layout import SweepFiles, find_runs, layer_folder
from ks.files.schema import RunConfig, read_json_as
from ks.report.answer import named_row
from ks.report.read_results import MEAN_SQUARED_ERROR, Study, read_runs, read_study
from ks.report.sentences import first_of, of_failures
from ks.report.verdict import converged_loss, parts_of

MOST_HOSTS = 3  # that a row lists by name
SAME = 1e-4  # relative difference of one loss that was computed on two machines
OF_ONE_SIZE = 1.05  # the most parameters over the fewest of ranks that count as of equal size


def read_studies(sources: Sequence[SweepFiles]) -> list[Study]:
    """Read several results folders as studies; that of a checkpoint is one study for each of its layers.

    The name of each is the end of the path of its folder, as long as it takes to tell all of them apart.

    Raises:
        UsageError: a folder that holds no results, or a file that cannot be read.
    """
    studies = {study.files: study for files in sources for study in _layers_of(read_study(files))}
    paths = [files.directory.parts for files in studies]
    length = next(n for n in itertools.count(1) if len({path[-n:] for path in paths}) == len(paths))
    return [dataclasses.replace(study, name="/".join(path[-length:])) for study, path in zip(studies.values(), paths)]


def _layers_of(study: Study) -> list[Study]:
    """Return the studies of the layers of a checkpoint that were trained; any other study alone."""
    if not study.config.layers:
        return [study]
    names = dict.fromkeys(row["weight_key"] for row in study.rows)
    folders = [layer_folder(study.files.directory, name) for name in names]
    return [read_study(dataclasses.replace(study.files, directory=folder)) for folder in folders]


def comparable(studies: Sequence[Study]) -> dict[tuple[str, str], list[Study]]:
    """Return the studies whose relative losses compare, by the metric of the loss and the kind of the inputs.

    A study of another criterion, or without a finished rank, is left out.
    """
    kinds: dict[tuple[str, str], list[Study]] = {}
    for study in studies:
        if study.units.relative and study.summary[["relative_loss", "parameters"]].notna().all(axis=1).any():
            inputs = (study.rows[0]["inputs"] or ISOTROPIC).split()[0]
            kinds.setdefault((study.words.loss_metric, inputs), []).append(study)
    return kinds


def are_of_one_weight(studies: Sequence[Study]) -> bool:
    """Return whether losses and parameters of studies compare as they are, without dividing them by those of dense."""
    zeros = [study.units.zero for study in studies]
    return number_of_weights(studies) == 1 and max(zeros) - min(zeros) <= SAME * max(zeros)


def number_of_weights(studies: Sequence[Study]) -> int:
    return len({study.config.problem.weight.sha256 for study in studies})


def at_equal_size(studies: Sequence[Study]) -> str:
    """Return which study loses least where trained ranks of all are nearest in size, the largest such size.

    Losses are equal if the largest would count as converged to a floor at the least one.

    Args:
        studies: of one weight, which are `comparable`.
    """
    points = [
        [row | {"study": study.name} for row in study.rows if None not in (row["relative_loss"], row["parameters"])]
        for study in studies
    ]

    def nearest(size: float) -> list[dict[str, Any]]:
        found = (min(rows, key=lambda row: abs(log(row["parameters"] / size))) for rows in points)
        return sorted(found, key=lambda row: row["relative_loss"])

    def sizes(group: list[dict[str, Any]]) -> list[float]:
        return sorted(row["parameters"] for row in group)

    groups = [nearest(row["parameters"]) for rows in points for row in rows]
    group = min(groups, key=lambda group: (sizes(group)[-1] / sizes(group)[0], -sizes(group)[0]))
    small, large = sizes(group)[0], sizes(group)[-1]
    if large > OF_ONE_SIZE * small:
        return "no ranks of equal size were trained in every study, so their losses show no better one"
    words, best, losses = studies[0].words, group[0], [row["relative_loss"] for row in group]
    size = f"{small:,.0f} parameters" if small == large else f"{small:,.0f} to {large:,.0f} parameters"
    shown = words.amounts(*losses)
    texts = [f"{row['study']} {loss} (rank {row['rank']})" for row, loss in zip(group, shown)]
    if losses[-1] <= converged_loss(losses[0]):
        equal = f"losses are equal within {words.show(losses[-1] - losses[0])}"
        return f"at equal size ({size}), {equal}: {first_of(texts)}"
    least = f"{best['study']} {words.loses} least: {words.whole(shown[0])} (rank {best['rank']})"
    return f"at equal size ({size}), {least}; {first_of(texts[1:])}"


def what_compares(studies: Sequence[Study]) -> list[str]:
    """Return sentences on what of these studies compares, and what does not."""
    kinds, sentences = comparable(studies), []
    weights = number_of_weights(studies)
    if weights > 1:
        sentences.append(
            f"These are studies of {weights} weights. Only sizes and relative losses compare: each loss is relative to "
            "the zero predictor on the same weight. 1% on one weight may cost the model more than 10% on another."
        )
        sources = {(row["weight"], row["loss_unit"]) for study in studies for row in study.rows[:1]}
        if len(sources) == 1 and all(study.summary["loss_increase"].notna().any() for study in studies):
            sentences.append("The predicted increases of the loss of the model compare if the inputs are of one model.")
    elif len(kinds) == 1 and len({study.rows[0]["inputs"] for study in studies}) == 1:
        sentences.append(
            "One weight and the same inputs: losses compare at equal parameters. Equal ranks of two families differ in "
            "size."
        )
    metrics, inputs = {metric for metric, _ in kinds}, {inputs for _, inputs in kinds}
    if len(metrics) > 1:
        sentences.append(
            "Relative losses by output energy and by the loss of the model do not compare: one is a fraction of the "
            "output energy, the other a fraction of the increase of the loss by the zero predictor."
        )
    if len(inputs) > 1:
        sentences.append("Losses under isotropic inputs and under measured ones do not compare.")
    if weights == 1 and inputs == {"measured"} and len({study.rows[0]["inputs"] for study in studies}) > 1:
        sentences.append("The inputs were measured on different data: a difference of losses may come from them.")
    if len(kinds) > 1:
        sentences.append("Each kind of loss has a figure of its own.")
    drawn = {study.name for found in kinds.values() for study in found}
    if without := [study.name for study in studies if study.name not in drawn]:
        sentences.append(f"Not in a figure, without a relative loss: {', '.join(without)}.")
    machines = {machine for study in studies for machine in machines_of(study)}
    if len(machines) > 1:
        sentences.append("Seconds are those of each machine: between machines, they compare no chains.")
    return sentences


def machines_of(study: Study) -> list[str]:
    """Return where the runs of a study took place: hosts, device and CPU threads, from the record of each run."""
    hosts: dict[str, set[str]] = {}
    for _, _, run in find_runs(study.files.directory, study.config.seeds[0]) if study.config.seeds else []:
        record = read_json_as(run.config, RunConfig) if run.config.is_file() else None
        if record is not None and (where := record.provenance):
            on_gpu, threads = str(record.settings.get("device")).startswith("cuda"), where.get("threads")
            device = f"{where.get('gpu' if on_gpu else 'cpu')}, {threads} thread{'' if threads == 1 else 's'}"
            hosts.setdefault(device, set()).add(str(where.get("host")))
    return [
        f"{', '.join(sorted(names)) if len(names) <= MOST_HOSTS else f'{len(names)} hosts'}: {device}"
        for device, names in hosts.items()
    ]


def study_row(study: Study) -> dict[str, Any]:
    """Return the row of a study, with the columns `STUDIES` and `STUDIES_RUNS` of `ks.files.columns`."""
    rows, words, target = study.rows, study.words, study.target
    named = named_row(rows, target) or {}
    runs = [run for run in read_runs(study.files, rows) if "(as rank" not in str(run["status"])]  # those are copies
    timed = [(seconds, run["rank"]) for run in runs if (seconds := run.get("train_seconds")) is not None]
    verdicts: dict[str, list[str]] = {}
    for row in rows:
        for part in parts_of(row):
            verdicts.setdefault(part, []).append(str(row["rank"]))
    kind, _, sha256 = (rows[0]["inputs"] or "").partition(" ")
    relative = study.loss_label == MEAN_SQUARED_ERROR
    reached = target is not None and any(row["reached_target"] for row in rows)
    return {
        "study": study.name,
        "layer": rows[0]["weight_key"] or rows[0]["weight"],
        "machine": "; ".join(machines_of(study)),
        "chain": study.config.problem.chain,
        "inputs": f"{kind} {sha256[:8]}".strip(),
        "loss": ("loss of the model" if words.of_model else "output energy") if relative else study.loss_label,
        "seeds": " ".join(map(str, study.config.seeds)),
        "target": target and f"{words.amounts(target)[0]}: {'reached' if reached else 'not reached'}",
        "reached": None if target is None else reached,
        "runs": ", ".join(f"{count} {status}" for status, count in Counter(str(run["status"]) for run in runs).items()),
        "verdicts": "; ".join(f"{verdict}: {', '.join(ranks)}" for verdict, ranks in verdicts.items()),
        "train_seconds": sum(seconds for seconds, _ in timed) or None,
        "longest_run": "rank {1}: {0:.1f} s".format(*max(timed)) if timed else None,
    } | {name: named.get(name) for name in ("rank", "share_of_dense", "relative_loss", "loss_increase", "energy_loss")}


def findings(studies: Sequence[Study], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the sentences that open a report of several studies: runs that failed, and which study is best."""
    sentences = of_failures((study.name, row) for study in studies for row in study.rows)
    asked = [row for row in rows if row["reached"] is not None]
    reached = [row for row in asked if row["reached"]]
    targets = {(study.target, study.words.loss_metric, study.rows[0]["inputs"]) for study in studies}
    target, words = studies[0].target, studies[0].words
    if are_of_one_weight(studies) and len(targets) == 1 and target is not None:
        limit = words.show(target)
        first = f"No study reaches the target of {limit}."
        if reached:
            least = min(row["share_of_dense"] for row in reached)
            best = [f"{row['study']} (rank {row['rank']})" for row in reached if row["share_of_dense"] == least]
            first = f"The smallest trained chain that {words.loses} at most {limit} has {least:.2%} of the parameters "
            first += f"of the dense weight: {' and '.join(best)}."
        return [first, *sentences]
    if are_of_one_weight(studies) and [*map(len, comparable(studies).values())] == [len(studies)]:
        first = at_equal_size(studies)
        firsts = [f"{first[0].upper()}{first[1:]}."]
    else:
        weights = number_of_weights(studies)
        firsts = [f"{len(rows)} studies of {'one weight' if weights == 1 else f'{weights} weights'}."]
    if asked:
        firsts.append(f"Targets that are reached: {len(reached)} of {len(asked)}.")
    return [*firsts, *sentences]


def shared_columns(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the texts of the columns that have the same one in every row, by the name of the column."""
    both = (*columns.STUDIES, *columns.STUDIES_RUNS)
    names = [column.name for column in both if column.type is columns.Text]
    equal = {name: {str(row[name]) for row in rows if row[name]} for name in names}
    return {name: texts.pop() for name, texts in equal.items() if len(texts) == 1 and all(row[name] for row in rows)}
