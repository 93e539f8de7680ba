"""Torch files from anywhere: read without running code, and without allocating more than the machine has."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ks.errors import UsageError, one_line
from ks.files.memory import check_fits

AS_TENSORS = "tensors alone, as in torch.save(model.state_dict(), path)"


def read_torch_file(path, what: str = "weights") -> Any:
    """Return the content of a torch file, tensors on the CPU.

    Only tensors and plain containers are read (weights_only). The sizes that the archive declares must fit into memory.

    Raises:
        UsageError: the file cannot be read as `what` it should hold, holds Python objects, or is too large.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such file" if not path.exists() else f"{path} is not a regular file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                declared = sum(entry.file_size for entry in archive.infolist())
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise UsageError(
                        f"{path} is a TorchScript program; load it by torch.jit.load, and save {AS_TENSORS}"
                    )
            check_fits(f"{path}, unpacked,", declared, "use a smaller file, or one tensor of it as .safetensors")
        with warnings.catch_warnings(action="ignore"):  # of torch, about kinds of tensors that are refused later
            return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        stored = re.search(r"GLOBAL ([\w.]+)", str(error))  # the class that is not allowed
        reason = f"it holds an object of {stored[1]}" if stored else "it is no torch file, or it holds Python objects"
        raise UsageError(f"{path} cannot be read as {what}: {reason}; save {AS_TENSORS}") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise UsageError(f"{path} cannot be read as {what} ({type(error).__name__}: {one_line(error, 160)})") from error


def tensors_in(content: Any, where: str) -> dict[str, torch.Tensor]:
    """Return every tensor in nested dicts, lists and tuples by its name, the parts joined by dots; '' for a lone one.

    A container that the file refers to several times is visited once, under its first name: a small file can hold
    2⁴⁰ references.

    Raises:
        UsageError: two tensors with one name; `where` is the file, for the message.
    """
    found: dict[str, torch.Tensor] = {}
    waiting, visited = [("", content)], set()
    while waiting:
        name, node = waiting.pop()
        if isinstance(node, torch.Tensor):
            if name in found:
                raise UsageError(f"{where} holds two tensors with the name {name!r}; save the weight alone")
            found[name] = node.detach()
        elif isinstance(node, (dict, list, tuple)) and id(node) not in visited:
            visited.add(id(node))
            items = [*(node.items() if isinstance(node, dict) else enumerate(node))]
            waiting += [(f"{name}.{part}" if name else str(part), child) for part, child in reversed(items)]
    return found


def plain(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Return a tensor as an ordinary strided one in memory of its own.

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
