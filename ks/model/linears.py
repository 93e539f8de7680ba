"""The linear layers of a model, by the names that its checkpoint uses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ks.errors import UsageError, one_line
from ks.files.globs import matching, nearest

# Components that torch puts into the names of modules; a checkpoint does not have them.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PARALLEL = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Linear:
    """A linear layer of a model: its width n, the key of its weight in a checkpoint, and how that is stored."""

    module: torch.nn.Module
    width: int
    key: str
    transposed: bool


def checkpoint_name(path: str) -> str:
    """Return the name of a module or tensor without the components that torch.compile, FSDP and such add."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def linears_of(model: torch.nn.Module) -> dict[str, Linear]:
    """Return all nn.Linear and Conv1D layers by the names that a checkpoint uses; the weight's key is `NAME.weight`."""
    linears = {}
    for path, module in unwrapped(model).named_modules(remove_duplicate=False):
        name = checkpoint_name(path)
        if isinstance(module, torch.nn.Linear):
            linears[name] = Linear(module, module.in_features, f"{name}.weight".lstrip("."), False)
        elif _is_conv1d(module):
            linears[name] = Linear(module, len(module.weight), f"{name}.weight".lstrip("."), True)
    return linears


def find_linears(model: torch.nn.Module, layers: str | Sequence[str]) -> dict[str, Linear]:
    """Return the layers of `linears_of` whose names match.

    Raises:
        UsageError: no layer matches.
    """
    linears = linears_of(model)
    matched = matching(linears, layers)
    if not matched:
        wanted = layers if isinstance(layers, str) else ", ".join(layers)
        raise UsageError(
            f"no nn.Linear or Conv1D of the model matches {one_line(wanted)!r}; {nearest(wanted, linears)}"
        )
    return {name: linears[name] for name in matched}


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside torch.compile and data parallelism."""
    if isinstance(model, PARALLEL):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else unwrapped(compiled)


def _is_conv1d(module: torch.nn.Module) -> bool:
    """Recognise the Conv1D of transformers, a linear layer with a weight (in, out), without importing transformers."""
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).mro())
