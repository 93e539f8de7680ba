"""Tensors of a checkpoint that are no weights of linear layers, recognised by dtypes, companions and names."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

QUANTISED = "parts of quantised layers (dequantise the checkpoint first)"
OPTIMIZER_STATE = "optimizer state"
AVERAGE = "moving averages of weights that the file holds too (give their full names to plan them instead)"
EMBEDDING = "embeddings, by their names (give their full names to plan them)"
REFUSED = (QUANTISED, OPTIMIZER_STATE)  # even if a tensor is asked for by its name

PACKED_DTYPE = re.compile(r"torch\.(u?int8|int32|float8_.*)|[UI]8|I32|F[48].*")  # of torch, or in .safetensors files
STATE_OF_PARAMETER = re.compile(r"(^|\.)state\.\d+\.\w+$")  # as in optimizer.state_dict()
AVERAGED = re.compile(r"(^|[._])(ema|shadow|averaged?)([._]|$)")
TABLE = re.compile(r"embed|^(wte|wpe|shared|relative_attention_bias)$|(^|_)emb$")  # components of a name
LINEAR = re.compile(r"linear|proj|dense|fc")  # names of layers that stand in modules with such a name


def kinds_of(entries: Mapping[str, Any]) -> dict[str, str]:
    """Return the kind of every tensor that is no weight of a linear layer, as words for a note.

    A module with a matrix of one-byte or int32 values is quantised, with its scales and zero points. An average is left
    out only beside its original, a tensor of the same shape under the same last two components of its name.

    Args:
        entries: tensors, or entries of `ks.files.weights.entries_of`, by name.
    """
    shapes = {name: shape_of(entry) for name, entry in entries.items()}
    packed = {name for name, entry in entries.items() if PACKED_DTYPE.fullmatch(str(entry.dtype))}
    quantised = {_module(name) for name in packed if len(shapes[name]) == 2} - {""}
    originals = defaultdict(set)
    for name, shape in shapes.items():
        if not AVERAGED.search(name.lower()):
            originals[_end(name)].add(shape)
    kinds = {}
    for name, shape in shapes.items():
        if _module(name) in quantised:
            kinds[name] = QUANTISED
        elif STATE_OF_PARAMETER.search(name):
            kinds[name] = OPTIMIZER_STATE
        elif AVERAGED.search(name.lower()) and shape in originals[_end(name)]:
            kinds[name] = AVERAGE
        elif any(map(TABLE.search, name.lower().split("."))) and not LINEAR.search(_end(name).lower().split(".")[0]):
            kinds[name] = EMBEDDING
    return kinds


def shape_of(entry: Any) -> tuple:
    """Return the sizes of an entry; a nested tensor has none."""
    return () if entry.is_nested else tuple(entry.shape)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])
