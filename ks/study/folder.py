"""The results folder of a study: its record, one sweep in it at a time, the claim for one study, and how a rerun joins.

The record, PREFIX_config.json, holds the settings that identify the study and the names of all its files.
"""

import contextlib
import dataclasses
import os
from pathlib import Path

from ks.cli import console
from ks.cli.flags import SweepConfig, TrainingFlags
from ks.cli.parser import Parser, command_line, groups, to_arguments
from ks.errors import UsageError
from ks.files.atomic import prepare_output_dir, read_json_object, write_json
from ks.files.layout import RunFiles, SweepFiles, find_runs
from ks.files.ownership import check_free, delete, locked, recorded
from ks.files.provenance import provenance
from ks.files.schema import StudyRecord, read_json_as
from ks.study.runs import TARGETS, Run, seeds_of
from ks.study.slurm_cluster import cancel_left
from ks.training.criterion_identity import Edits
from ks.training.problem import Problem
from ks.training.run_state import NOT_COMPARED, changes, settings_in, settings_of

# They are not taken from a study: where the weight is, and what changes reports and files only.
NOT_TAKEN = ("weight_path", "log_to", "log_interval", "verbose", "quiet", "save_interval")
TRAINING = [field.name for _, fields in groups(TrainingFlags) for field in fields]
TAKEN = (*(name for name in TRAINING if name not in NOT_TAKEN), *TARGETS, "tight_bounds", "stop_at")
SPLITS = {"row_splits", "col_splits"}
REMEDY = "choose another --output_dir"


def record_of(config: SweepConfig, problem: Problem, ranks: list[int]) -> dict:
    """Return the record of a study of one weight, the content of its config file."""
    name = " ".join(filter(None, [Path(config.weight_path).name, problem.weight.key]))
    inputs = problem.layer_inputs.description["kind"]
    return _record(config, settings_of(config, problem), ranks) | {
        "title": f"{name}, {problem.rows} × {problem.cols}: {problem.chain.describe()}, {inputs} inputs",
        "problem": problem.describe(),
    }


def checkpoint_record_of(config: SweepConfig, edits: Edits, checkpoint: str, layers: list[str]) -> dict:
    """Return the record of a study of several layers of a checkpoint; each of them has one of its own."""
    settings = {name: value for name, value in config.training_settings().items() if name not in NOT_COMPARED}
    settings |= {"checkpoint": checkpoint, **dataclasses.asdict(edits)}
    return _record(config, settings, list(config.ranks or [])) | {"layers": layers}


def _record(config: SweepConfig, settings: dict, ranks: list[int]) -> dict:
    seeds = seeds_of(config)
    return {
        "settings": settings | {"seed": seeds[0]},
        "ranks": ranks,
        "seeds": seeds,
        "arguments": vars(config),
        "provenance": provenance(),
    }


def study_in(config: SweepConfig) -> StudyRecord | None:
    """Return the record of the study in --output_dir; None if there is none, it is not valid, or it is overwritten."""
    path = config.files().config
    if config.overwrite or not path.is_file():
        return None
    try:
        return read_json_as(path, StudyRecord)
    except UsageError:
        return None  # claiming the folder refuses it


def parse(parser: Parser[SweepConfig], argv: list[str]) -> SweepConfig:
    """Return the configuration of a sweep; in the folder of a study, flags that are left out take its values.

    Its seeds stay in the study too.
    """
    config, given = parser.parse_given(argv)
    study = study_in(config)
    if study is None or not _is_of_same_weight(config, given, study):
        return config
    chains = {"chain"} if given & SPLITS else SPLITS if "chain" in given else set()  # they exclude each other
    chains = {"chain", *SPLITS} if "chains" in given else chains
    targets = {*TARGETS} if given & {*TARGETS} else set()
    taken = {name: study.arguments.get(name) for name in TAKEN if name not in given | chains | targets}
    merged = parser.parse([*to_arguments(taken), *argv])
    if not given & {"ranks", *TARGETS}:
        merged = dataclasses.replace(merged, ranks=tuple(study.ranks))  # so that a refusal prints them
    values = {name: getattr(merged, name) for name in taken}
    shown = [
        f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values.items()
        if value not in (None, getattr(config, name))
    ]
    if shown:
        console.note(f"taken from the study in {config.output_dir}: {', '.join(shown)}", config.quiet)
    seeds = tuple(dict.fromkeys([*study.seeds, *(merged.seeds or ())]))
    return merged if "seed" in given or seeds == (merged.seed,) else dataclasses.replace(merged, seeds=seeds)


def _is_of_same_weight(config: SweepConfig, given: set[str], study: StudyRecord) -> bool:
    """Return whether a study is of a weight with the same name and key, as far as they are given."""
    path, keys = (study.arguments.get(name) for name in ("weight_path", "weight_key"))
    keys = [keys] if isinstance(keys, str) else list(keys or ())  # a study of one weight records its name alone
    same_key = "weight_key" not in given or list(config.weight_key or ()) == keys
    return Path(config.weight_path).name == Path(str(path)).name and same_key


def held(files: SweepFiles) -> contextlib.AbstractContextManager[None]:
    """Make the results folder if needed, and return a context in which no other sweep works there.

    Raises:
        UsageError: it cannot be written, or another sweep works in it.
    """
    prepare_output_dir(files.directory)
    return locked(files.lock, "another sweep")


def claim_folder(config: SweepConfig, runs: list[Run], record: dict) -> None:
    """Claim a results folder for a study: record its settings and files, delete old outputs, cancel jobs left by SLURM.

    Args:
        config: of the sweep; its folder exists. With `overwrite`, results in it are deleted, also those of another
            study, as far as they are ours.
        record: content of the config file; `record["settings"]` identifies the study, `record["files"]` is added.
    Raises:
        UsageError: the folder holds another study, or a file of the user's is in the way.
    """
    refuse_another_study(config, record["settings"])
    files, inputs = config.files(), config.files_read()
    folder, all_files = files.directory, files.all({run.seed for run in runs})
    cancel_left(folder)
    present = [run for _, _, run in find_runs(folder)]
    owned = recorded(files.config, [*files.all(), *(path for run in present for path in run.all())])
    for run in runs:
        for inside in (run.files.directory, run.files.directory.parent):
            if inside != folder and inside.is_symlink():
                raise UsageError(f"{inside} is a symbolic link, and nothing is written through one; {REMEDY}")
        check_free(run.files.all(), owned | owned_by_run(run.files), inputs, REMEDY)
    check_free(all_files, owned | _plotted(files), inputs, REMEDY)
    if config.overwrite:
        for path in _other_studies(files):
            delete(recorded(path), inputs)
        for found in present:
            if not found.directory.is_symlink() and not found.directory.parent.is_symlink():
                delete(owned_by_run(found) | owned & {*found.all()}, inputs)
    else:
        for run in runs:
            if not owned_by_run(run.files):  # a damaged record: the run starts anew
                delete(owned & {*run.files.all()}, inputs)
    delete(owned & {*files.outputs(), *files.metric_figures(), *files.samples_left()}, inputs)
    ours = sorted(
        {*all_files, *(path for path in owned if path.exists()), *(p for run in runs for p in run.files.all())}
    )
    record["files"] = [path.relative_to(folder).as_posix() for path in ours]
    write_json(files.config, record)
    for run in runs:
        if run.files.directory.exists():
            prepare_output_dir(run.files.directory)


def _plotted(files: SweepFiles) -> set[Path]:
    """Return the figures that plot_rank_results.py has drawn in the folder from the results in it."""
    sources = read_json_object(files.figures_record).get("sources")
    return recorded(files.figures_record) if sources == [str(files.directory)] else set()


def owned_by_run(files: RunFiles) -> set[Path]:
    """Return the files that the record of a run names, and its log, which the sweep writes."""
    owned = recorded(files.config, [*files.all(), *files.epoch_checkpoints()])
    return owned | {files.log} if owned else owned


def _other_studies(files: SweepFiles) -> list[Path]:
    """Return the records of studies with another --save_prefix."""
    found = [path for path in sorted(files.directory.glob("*_config.json")) if path != files.config]
    return [path for path in found if not path.is_symlink() and {"settings", "ranks"} <= read_json_object(path).keys()]


def refuse_another_study(config: SweepConfig, settings: dict) -> None:
    """Raise UsageError if the results folder holds another study than one with these settings, unless it is replaced.

    The message has the two commands that run the study nevertheless.
    """
    if config.overwrite:
        return
    files = config.files()
    record, others = read_json_object(files.config), _other_studies(files)
    before, difference = record.get("settings"), ""
    if others:
        difference = f"the study of --save_prefix {others[0].name.removesuffix('_config.json')}"
    elif isinstance(before, dict):
        if changed := changes(settings_in(before, record.get("loss")), settings):
            difference = f"another study ({changed})"
    elif find_runs(files.directory) or files.config.exists() or files.summary_csv.exists():
        difference = f"results of something else (no readable {files.config.name})"
    if difference:
        folder, number = config.output_dir.rstrip("/"), 2
        if not folder.strip("./"):  # ._2 would be a hidden folder in the one that is meant
            folder = os.path.abspath(config.output_dir)
        while Path(f"{folder}_{number}").exists():
            number += 1
        beside, instead = (
            command_line("rank_sweep_study.py", dataclasses.replace(config, **other))
            for other in ({"output_dir": f"{folder}_{number}"}, {"overwrite": True})
        )
        raise UsageError(f"{files.directory} holds {difference}; to keep it: {beside}; to replace it: {instead}")
