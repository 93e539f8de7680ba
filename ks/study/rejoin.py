"""A rerun in the folder of a study: flags that are left out take the study's values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ks.cli import console
from ks.cli.flags import SweepConfig, TrainingFlags
from ks.cli.parser import Parser, groups, to_arguments
from ks.errors import UsageError
from ks.files.layout import SweepFiles
from ks.files.schema import StudyRecord, read_json_as

# These say where the weight is, or change reports and files only.
NOT_TAKEN = ("weight_path", "log_to", "log_interval", "verbose", "quiet", "save_interval")
TRAINING = tuple(field.name for _, fields in groups(TrainingFlags) for field in fields)
TAKEN = (
    *(name for name in TRAINING if name not in NOT_TAKEN),
    *("target_relative_loss", "tight_bounds", "stop_at"),
)
SPLITS = ("row_splits", "col_splits")


def study_in(config: SweepConfig) -> StudyRecord | None:
    """Return the record of the study in --output_dir; None if there is none, it is not valid, or it is overwritten."""
    files = SweepFiles(Path(config.output_dir).absolute(), config.save_prefix)
    if config.overwrite or not files.config.is_file():
        return None
    try:
        return read_json_as(files.config, StudyRecord)
    except UsageError:
        return None  # claiming the folder refuses it


def parse(parser: Parser[SweepConfig], argv: list[str]) -> SweepConfig:
    """Return the configuration of a sweep; in the folder of a study, flags that are left out take its values.

    Its seeds stay in the study too.
    """
    config, given = parser.parse_given(argv)
    study = study_in(config)
    if study is None or not _same_weight(config, given, study):
        return config
    taken = _values_of(study, given)
    merged = parser.parse([*to_arguments(taken), *argv])
    if not given & {"ranks", "target_relative_loss"}:
        merged = replace(merged, ranks=tuple(study.ranks))  # so that a refusal prints them
    shown = [f"--{name} {_text(value)}" for name, value in taken.items() if value != getattr(config, name)]
    if shown:
        console.note(f"taken from the study in {config.output_dir}: {', '.join(shown)}", config.quiet)
    seeds = tuple(dict.fromkeys([*study.seeds, *(merged.seeds or ())]))
    return merged if "seed" in given or seeds == (merged.seed,) else replace(merged, seeds=seeds)


def _same_weight(config: SweepConfig, given: set[str], study: StudyRecord) -> bool:
    """Return whether a study is of a weight with the same name and key, as far as they are given."""
    same_file = Path(config.weight_path).name == Path(str(study.arguments.get("weight_path"))).name
    return same_file and (
        "weight_key" not in given or _names(config.weight_key) == _names(study.arguments.get("weight_key"))
    )


def _names(keys: Any) -> list[str]:
    """Return names of weights as a list; a study of one weight records its name alone."""
    return [keys] if isinstance(keys, str) else list(keys or ())


def _values_of(study: StudyRecord, given: set[str]) -> dict[str, Any]:
    """Return the study's values of the flags that were not given; splits and --chain exclude each other."""
    left_out = given | ({"chain"} if given & {*SPLITS} else {*SPLITS} if "chain" in given else set())
    values = {name: study.arguments.get(name) for name in TAKEN if name not in left_out}
    known = {name: value for name, value in values.items() if value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
