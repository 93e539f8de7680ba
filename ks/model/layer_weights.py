"""The weights of a checkpoint or of a model that match globs, read one at a time."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ks.errors import UsageError, one_line
from ks.files.globs import matching, nearest
from ks.files.tensor_kinds import REFUSED, kinds_of
from ks.files.weights import Weight, entries_of, is_matrix, load_entry, shape_of
from ks.model.linears import coverage, linears_of, parameters_of, place_of, refusals

MAX_LISTED = 3  # of the names that a remark lists


@dataclass(frozen=True)
class LayerWeight:
    """One weight W of shape (m, n) = (out_features, in_features), which is read when it is needed."""

    name: str
    rows: int
    read: Callable[[], Weight]
    place: Hashable  # of its values, equal for weights that are tied


@dataclass(frozen=True)
class Selection:
    """The 2-D weights that match globs, in the order of the checkpoint."""

    weights: tuple[LayerWeight, ...]
    source: str  # name of the checkpoint's file, without folders; empty for weights in memory
    notes: tuple[str, ...]  # the skipped tensors, a line for each reason
    coverage: str  # how many parameters these weights have, and where the others are


def select_weights(
    source: str | Path | Mapping[str, torch.Tensor] | torch.nn.Module,
    layers: str | Sequence[str] = "**",
    transpose: bool = False,
) -> Selection:
    """Find the weights that match globs.

    Globs match the names of weights (`encoder.layer.*.output.dense.weight`) or those names without `.weight`. Tensors
    that are not weights of linear layers are skipped (`ks.files.tensor_kinds`), and of a model the layers that a chain
    cannot replace (`ks.model.linears.refusals`); notes list them with the reasons.

    Args:
        source: a file of weights or the .index.json of a sharded checkpoint; tensors by name; or a model, whose
            nn.Linear layers are meant (and the Conv1D layers of transformers, which are transposed).
        layers: globs, as in `ks.files.globs.matches`.
        transpose: weights of a file or mapping are stored as (in, out).
    Raises:
        UsageError: the file cannot be read, a glob matches no 2-D weight, or a name without wildcards one that is
            skipped; embeddings and averages in a file are planned if they are named so.
    """
    globs = [layers] if isinstance(layers, str) else list(layers)
    in_model, file = isinstance(source, torch.nn.Module), ""
    if isinstance(source, torch.nn.Module):
        where, linears, kinds, parts = "the model", linears_of(source).values(), refusals(source), parameters_of(source)
        entries: dict[str, Any] = {linear.key: linear.module.weight for linear in linears}
        stored_transposed = {linear.key for linear in linears if linear.transposed}
    else:
        if isinstance(source, Mapping):
            where, entries = "the mapping", dict(source)
        else:
            where, entries, file = str(source), entries_of(Path(source)), Path(source).name
        kinds, stored_transposed = kinds_of(entries), set(entries) if transpose else set()
        parts = {name: (math.prod(shape_of(each)), kinds.get(name) or _kind_of(each)) for name, each in entries.items()}
    for glob in globs:
        if not _matching(entries, [glob]):
            raise UsageError(f"{where}: nothing matches {one_line(glob)!r}; {nearest(glob, entries)}")
    weights, skipped = [], defaultdict(list)
    for name in _matching(entries, globs):
        entry, transposed = entries[name], name in stored_transposed
        if in_model and entry.is_meta:
            raise UsageError(
                f"{one_line(name)} of the model has no values: it is offloaded, or on the meta device; plan the file "
                "of its checkpoint instead"
            )
        kind, is_named = kinds.get(name), name in globs or name.removesuffix(".weight") in globs
        if kind and is_named and (in_model or kind in REFUSED):
            raise UsageError(f"{where}: {one_line(name)} cannot be planned: {kind}")
        if kind and not is_named:
            skipped[kind].append(name)
        elif not is_matrix(entry):
            skipped["not 2-D weights"].append(name)
        else:
            read = functools.partial(load_entry, entry, name, f"{where}, key {name!r}", transposed)
            rows = shape_of(entry)[int(transposed)]
            is_in_memory = isinstance(entry, torch.Tensor) and entry.layout is torch.strided
            place = place_of(entry) if is_in_memory else name
            weights.append(LayerWeight(name, rows, read, (place, transposed)))
    notes = [f"skipped {listed(names)}: {kind}" for kind, names in skipped.items()]
    if not weights:
        raise UsageError(
            f"{where}: {' '.join(globs)} matches no 2-D weight that a chain can replace; {'; '.join(notes)}"
        )
    return Selection(tuple(weights), file, tuple(notes), coverage(parts, {weight.name for weight in weights}))


def _kind_of(entry) -> str:
    return "other 2-D weights" if is_matrix(entry) else "tensors that are not 2-D"


def _matching(names: Iterable[str], globs: list[str]) -> list[str]:
    """Return the names that match a glob, with or without `.weight`."""
    return [name for name in names if matching([name, name.removesuffix(".weight")], globs)]


def listed(names: list[str]) -> str:
    """Return names in one line, the first ones alone if there are many."""
    more = f", … ({len(names)} in all)" if len(names) > MAX_LISTED else ""
    return one_line(", ".join(names[:MAX_LISTED]) + more)
