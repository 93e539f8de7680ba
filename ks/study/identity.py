"""The identity of a study: the record of its settings in the results folder, and how a rerun there joins it."""

import dataclasses
from pathlib import Path
from typing import Any

from ks.cli import console
from ks.cli.flags import SweepConfig, TrainingFlags
from ks.cli.parser import Parser, command_line, groups, to_arguments
from ks.errors import UsageError
from ks.files.layout import SweepFiles
from ks.files.provenance import provenance
from ks.files.schema import StudyRecord, read_json_as
from ks.study.runs import seeds_of
from ks.training.edits import Edits
from ks.training.problem import Problem
from ks.training.run_state import NOT_COMPARED, changes, settings_in, settings_of

# They are not taken from a study: where the weight is, and what changes reports and files only.
NOT_TAKEN = ("weight_path", "log_to", "log_interval", "verbose", "quiet", "save_interval")
TRAINING = tuple(field.name for _, fields in groups(TrainingFlags) for field in fields)
TAKEN = (*(name for name in TRAINING if name not in NOT_TAKEN), "target_relative_loss", "tight_bounds", "stop_at")
SPLITS = {"row_splits", "col_splits"}


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
    files = SweepFiles(Path(config.output_dir).absolute(), config.save_prefix)
    if config.overwrite or not files.config.is_file():
        return None
    try:
        return read_json_as(files.config, StudyRecord)
    except UsageError:
        return None  # claiming the folder refuses it


def is_same_study(study: StudyRecord, record: dict) -> bool:
    """Return whether a record is of the study in the folder, or continues it with more epochs."""
    return not changes(settings_in(study.settings, study.loss), record["settings"])


def parse(parser: Parser[SweepConfig], argv: list[str]) -> SweepConfig:
    """Return the configuration of a sweep; in the folder of a study, flags that are left out take its values.

    Its seeds stay in the study too.
    """
    config, given = parser.parse_given(argv)
    study = study_in(config)
    if study is None or not _is_of_same_weight(config, given, study):
        return config
    splits = {"chain"} if given & SPLITS else SPLITS if "chain" in given else set()  # they exclude each other
    values = {name: study.arguments.get(name) for name in TAKEN if name not in given | splits}
    taken = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    merged = parser.parse([*to_arguments(taken), *argv])
    if not given & {"ranks", "target_relative_loss"}:
        merged = dataclasses.replace(merged, ranks=tuple(study.ranks))  # so that a refusal prints them
    shown = [f"--{name} {_text(value)}" for name, value in taken.items() if value not in (None, getattr(config, name))]
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


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def remedies_of(config: SweepConfig) -> str:
    """Return the two commands that run a study although the results folder holds another one."""
    folder, number = config.output_dir.rstrip("/"), 2
    while Path(f"{folder}_{number}").exists():
        number += 1
    script = "rank_sweep_study.py"
    beside = command_line(script, dataclasses.replace(config, output_dir=f"{folder}_{number}"))
    instead = command_line(script, dataclasses.replace(config, overwrite=True))
    return f"to keep it: {beside}; to replace it: {instead}"
