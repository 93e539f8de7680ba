"""The command line that reproduces a study, without a path of the machine it ran on."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from ks.cli.flags import SweepConfig
from ks.cli.parser import path, to_arguments
from ks.files.schema import StudyRecord


def reproducing_command(record: StudyRecord) -> str:
    """Return the command of a sweep with the flags that are not at their defaults; of files, the names alone.

    Args:
        record: of the sweep, whose ranks and seeds may have come from several commands.
    """
    arguments = record.arguments | {"ranks": record.ranks, "max_rank": None, "overwrite": False}
    if record.seeds != [arguments.get("seed", 0)]:
        arguments["seeds"] = record.seeds
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(SweepConfig):
        value: Any = arguments.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if value != field.default:
            is_path = field.metadata["flag"].convert is path and isinstance(value, str)
            settings[field.name] = Path(value).name if is_path else value
    first = {name: settings[name] for name in ("weight_path", "weight_key", "inputs") if name in settings}
    return "python rank_sweep_study.py " + shlex.join(to_arguments(first | settings))
