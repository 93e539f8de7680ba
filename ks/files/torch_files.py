"""Torch files from anywhere: read without running code, and without allocating more than the machine has."""

import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ks.errors import UsageError, one_line
from ks.files.memory import check_fits

MAX_ENTRIES = 1_000_000  # tensors and containers in one file
MAX_DEPTH = 100


def read_torch_file(path, what: str = "weights") -> Any:
    """Return the content of a torch file, tensors on the CPU.

    Only tensors and plain containers are read (weights_only). The sizes that the archive declares must fit into memory.

    Args:
        path: of the file.
        what: it should hold, for the message.
    Raises:
        UsageError: the file cannot be read, holds Python objects, or is too large.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such file" if not path.exists() else f"{path} is not a regular file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                declared = sum(entry.file_size for entry in archive.infolist())
            check_fits(f"{path}, unpacked,", declared, "use a smaller file, or one tensor of it as .safetensors")
        with warnings.catch_warnings(action="ignore"):  # of torch, about kinds of tensors that are refused later
            return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} cannot be read as {what}: it is no torch file, or it holds Python objects; save tensors, as in "
            "torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise UsageError(f"{path} cannot be read as {what} ({type(error).__name__}: {one_line(error, 160)})") from error


def tensors_in(content: Any, where: str) -> dict[str, torch.Tensor]:
    """Return every tensor in nested dicts, lists and tuples by its name, the parts joined by dots; '' for a lone one.

    Args:
        content: of a file.
        where: the file, for messages.
    Raises:
        UsageError: two tensors with one name, more than a million entries, or nesting deeper than 100.
    """
    found: dict[str, torch.Tensor] = {}
    for count, (name, tensor) in enumerate(_walk(content, "", 0, where)):
        if count >= MAX_ENTRIES:
            raise UsageError(f"{where} holds more than {MAX_ENTRIES} entries; save the weight alone")
        if tensor is None:
            continue
        if name in found:
            raise UsageError(f"{where} holds two tensors with the name {name!r}; save the weight alone")
        found[name] = tensor
    return found


def _walk(node: Any, name: str, depth: int, where: str) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield (name, tensor), and (name, None) for everything else, so that the caller can count."""
    if depth > MAX_DEPTH:
        raise UsageError(f"{where} is nested deeper than {MAX_DEPTH} levels; save the weight alone")
    yield name, node.detach() if isinstance(node, torch.Tensor) else None
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for part, child in items:
        yield from _walk(child, f"{name}.{part}" if name else str(part), depth + 1, where)


def plain(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Return a tensor as an ordinary strided one in memory of its own.

    Args:
        tensor: from a file.
        where: the file and key, for messages.
    Raises:
        UsageError: a sparse, quantised, nested or meta tensor, or one that is larger than the memory.
    """
    kinds = {
        "sparse": tensor.layout != torch.strided,
        "quantised": tensor.is_quantized,
        "nested": tensor.is_nested,
        "a meta tensor without values": tensor.is_meta,
    }
    for kind, holds in kinds.items():
        if holds:
            raise UsageError(
                f"{where} is {kind}; an ordinary dense tensor is needed (tensor.to_dense(), .dequantize())"
            )
    check_fits(where, tensor.numel() * tensor.element_size(), "use a smaller weight")
    return tensor.resolve_conj().resolve_neg()
