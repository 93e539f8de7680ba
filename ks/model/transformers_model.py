"""Models of transformers: their configuration in a folder, and an empty model from it, without code of the folder."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ks.errors import UsageError, one_line
from ks.files.atomic import write_json

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
# Entries by which a configuration names code elsewhere: classes in the folder or on a hub, and kernels on a hub.
CODE = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether the class of a model is one of transformers itself, which is not imported for that."""
    names = {kind.__name__ for kind in type(model).mro()}
    return "PreTrainedModel" in names and type(model).__module__.startswith("transformers.")


def write_configuration(model: Any, folder: Path) -> None:
    """Write config.json and generation_config.json of a model of transformers."""
    config = json.loads(model.config.to_json_string(), object_hook=_without_code)
    dtype = str(model.dtype).removeprefix("torch.")
    config.pop("quantization_config", None)  # also left by transformers where it has dequantised the weights
    write_json(folder / CONFIG_FILE, config | {"architectures": [type(model).__name__], "dtype": dtype})
    if model.can_generate():
        model.generation_config.to_json_file(folder / GENERATION_FILE)


def empty_model(folder: Path, name: str) -> nn.Module:
    """Return a model of transformers on the meta device, in evaluation mode, by the configuration in a folder.

    Args:
        folder: with config.json.
        name: of the class, which must be one of the installed transformers.
    Raises:
        UsageError: there is no configuration or no such class, transformers is missing or older than the one that
            wrote it, or the class does not take it.
    """
    by_hand = "give the model: ks.load_compressed(model, folder)"
    name, path = one_line(name), folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(f"{folder} has no {CONFIG_FILE}, since {name} is no class of transformers; {by_hand}")
    try:
        import transformers
    except ImportError as error:
        reason = f"which cannot be imported ({one_line(error)})"
        raise UsageError(f"{folder} needs transformers, {reason}; install it, or {by_hand}") from error
    installed = f"the installed transformers {transformers.__version__}"
    try:
        text = path.read_text("utf-8")
        if named := [name for name in CODE if f'"{name}"' in text]:
            print(f"{path}: {', '.join(named)} left out, because it can name code to run", file=sys.stderr)
        config = json.loads(text, object_hook=_decoded)
        written_by = str(config.get("transformers_version", "0.0"))
        if _version(transformers.__version__) < _version(written_by):
            raise UsageError(f"{folder} is of transformers {one_line(written_by)}, newer than {installed}; update it")
        kind: Any = getattr(transformers, name, None)
        known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if not known:
            raise UsageError(f"{folder} holds a {name}, which {installed} does not have; {by_hand}")
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(config))
        if model.can_generate() and (folder / GENERATION_FILE).is_file():
            model.generation_config = type(model.generation_config).from_pretrained(folder)
    except UsageError:
        raise
    except Exception as error:  # a damaged configuration can raise nearly anything
        raise UsageError(f"{path}: {installed} makes no {name} of it ({one_line(error, 200)}); {by_hand}") from error
    return model.eval()


def _without_code(entries: dict) -> dict:
    return {name: entry for name, entry in entries.items() if name not in CODE}


def _decoded(entries: dict) -> Any:
    """Return a JSON object without entries that name code, or the infinity or NaN that transformers writes as one."""
    return float(entries["__float__"]) if entries.keys() == {"__float__"} else _without_code(entries)


def _version(text: str) -> tuple[int, ...]:
    """Return major and minor version, which change what a configuration means."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))
