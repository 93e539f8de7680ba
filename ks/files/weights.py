"""Dense weights in files: load one 2-D weight, save one."""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from ks.errors import UsageError, one_line
from ks.files.globs import nearest
from ks.files.memory import check_fits
from ks.files.schema import CheckpointIndex, read_json_as
from ks.files.tensor_kinds import REFUSED, kinds_of, shape_of
from ks.files.torch_files import plain, read_torch_file, tensors_in

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".npy")
INDEX_SUFFIX = ".index.json"  # of a checkpoint in several files


class NothingToLearn(UsageError):
    """A weight of zeros, or one that is not finite: a plan of many layers goes on without it."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A loaded weight: the m × n tensor in its stored dtype on the CPU, and the key that it had in its file."""

    tensor: torch.Tensor
    key: str | None

    def sha256(self) -> str:
        """Return the hash of the tensor, computed once; the same weight in another file has the same hash."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return tensors_sha256(self.tensor)


def tensors_sha256(*tensors: torch.Tensor) -> str:
    """Return a hash of shapes, dtypes and values of tensors on the CPU; contiguous ones are not copied."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def packed(weights: Sequence[Weight], transpose: bool = False) -> bytes:
    """Return a .pth file with these weights alone; `load_weight` reads it with the same keys and transpose."""
    tensors = {weight.key: (weight.tensor.t() if transpose else weight.tensor).contiguous() for weight in weights}
    buffer = io.BytesIO()
    torch.save(tensors if all(tensors) else next(iter(tensors.values())), buffer)
    return buffer.getvalue()


def load_weight(path, key: str | None = None, transpose: bool = False) -> Weight:
    """Load one 2-D weight.

    Args:
        path: .pth, .pt, .bin or .ckpt (tensor, Parameter, state_dict or nested dicts and lists of them), .safetensors
            or .npy; or the .index.json of a checkpoint in several files.
        key: name of the tensor in the file, nested names joined by dots; may be left out where the file holds
            exactly one 2-D floating tensor.
        transpose: for weights stored as (in, out).
    Returns:
        the weight, shape (m, n) = (out_features, in_features), dtype as stored.
    Raises:
        UsageError: anything that is not one finite, non-zero, real 2-D weight; the message names the candidates.
    """
    path = Path(path)
    try:
        tensors = entries_of(path)
    except OSError as error:  # a folder above it is closed, or the name is too long
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    refused = {name: kind for name, kind in kinds_of(tensors).items() if kind in REFUSED}
    key = _find_key(path, tensors, refused, key)
    if key in refused:
        raise UsageError(f"{path}, key {key!r} is no weight of a layer: {refused[key]}")
    return load_entry(tensors[key], key, f"{path}, key {key!r}" if key else f"{path}", transpose)


def load_entry(entry, key: str, where: str, transpose: bool = False) -> Weight:
    """Return the weight of an entry of `entries_of`, as `load_weight` does; `where` is file and key, for messages."""
    tensor = read_entry(entry, where).detach().cpu()
    _check_weight(where, tensor)
    return Weight(tensor.t().contiguous() if transpose else tensor.contiguous(), key or None)


def read_entry(entry, where: str) -> torch.Tensor:
    """Return the tensor of an entry of `entries_of`, an ordinary strided one; `where` is file and key, for messages.

    Raises:
        UsageError: it cannot be read, is no ordinary dense tensor, or exceeds the memory.
    """
    return plain(entry() if isinstance(entry, _Lazy) else entry, where)


def entries_of(path: Path, what: str = "weights") -> dict:
    """Return every tensor of a file by name ('' for a lone one); safetensors entries are read by `read_entry` alone.

    Args:
        path: with one of `SUFFIXES`, or `INDEX_SUFFIX`.
        what: the file should hold, for messages.
    Raises:
        UsageError: the file cannot be read.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise UsageError(f"{path} is {kind}; a file ({', '.join(SUFFIXES)}) is needed")
    suffix, is_index = path.suffix.lower(), path.name.lower().endswith(INDEX_SUFFIX)
    if suffix not in SUFFIXES and not is_index:
        known = ", ".join((*SUFFIXES, INDEX_SUFFIX))
        raise UsageError(f"{path}: suffix {path.suffix!r} is not known; use one of {known}")
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if not start:
        raise UsageError(f"{path} is empty ({path.stat().st_size} bytes)")
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a pointer of Git LFS in the place of the file; fetch the file (git lfs pull)")
    if start.startswith((b"<!doctype", b"<html")):
        raise UsageError(f"{path} is a web page, perhaps of a failed download; download the file itself")
    if is_index:
        return _read_sharded(path, what)
    if suffix in TORCH_SUFFIXES:
        return tensors_in(read_torch_file(path, what), str(path))
    try:
        if suffix == ".npy":
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # a map cannot be larger than its file
            check_fits(str(path), mapped.nbytes, "use a smaller weight")
            return {"": torch.from_numpy(np.array(mapped))}
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: _Lazy(path, name, file) for name in file.keys()}  # noqa: SIM118, it is no dict
    except UsageError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything, out of two libraries
        raise UsageError(f"{path} cannot be read as {what} ({type(error).__name__}: {one_line(error)})") from error


class _Lazy:
    """One entry of a .safetensors file: its shape and type are known, its values are read when called."""

    is_nested = False

    def __init__(self, path: Path, name: str, file):
        self.path, self.name, stored = path, name, file.get_slice(name)
        self.shape, self.dtype = tuple(stored.get_shape()), stored.get_dtype()

    def __call__(self) -> torch.Tensor:
        try:
            with safetensors.safe_open(self.path, framework="pt", device="cpu") as file:
                return file.get_tensor(self.name)
        except Exception as error:  # SafetensorError, or torch has no such dtype
            raise UsageError(f"{self.path}, key {self.name!r} cannot be read ({one_line(error)})") from error


def _read_sharded(path: Path, what: str) -> dict:
    """Return the entries of all files that are listed in an index such as model.safetensors.index.json."""
    file_of = read_json_as(path, CheckpointIndex, "the index of a checkpoint").weight_map
    entries: dict = {}
    for name in sorted(set(file_of.values())):
        if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise UsageError(f"{path} lists {one_line(name)!r}; .safetensors or .bin files in its folder are needed")
        entries |= entries_of(path.with_name(name), what)
    if missing := [key for key in file_of if key not in entries]:
        raise UsageError(f"{path} lists {one_line(missing[0])!r}, which is not in {file_of[missing[0]]}")
    return {key: entries[key] for key in file_of}


def is_matrix(entry) -> bool:
    """Return whether an entry of `entries_of` is a 2-D tensor of a dtype that a weight may have."""
    allowed = ("F64", "F32", "F16", "BF16") if isinstance(entry, _Lazy) else (torch.float64, *DTYPES.values())
    return len(shape_of(entry)) == 2 and entry.dtype in allowed


def _names_and_shapes(tensors: dict) -> str:
    """Return the names and shapes of tensors; of names that differ in numbers alone, such as layers, the first one."""
    alike: dict[tuple, list[str]] = {}
    for name, entry in tensors.items():
        alike.setdefault((re.sub(r"\b\d+\b", "", name), shape_of(entry)), []).append(name)
    more = {names[0]: f" and {len(names) - 1} alike" if len(names) > 1 else "" for names in alike.values()}
    return ", ".join(f"{names[0]} {shape}{more[names[0]]}" for (_, shape), names in alike.items())


def _find_key(path: Path, tensors: dict, refused: dict[str, str], key: str | None) -> str:
    """Return the key if the file has it; without a key, that of its only 2-D weight."""
    if key is not None and key in tensors:
        return key
    if key is None and list(tensors) == [""]:
        return ""
    matrices = {name: entry for name, entry in tensors.items() if is_matrix(entry) and name not in refused}
    if key is None and len(matrices) == 1:
        return next(iter(matrices))
    start = f"{path}: " if key is None else f"{path} has no key {key!r}; "
    if not matrices:
        kinds = "".join(f"; {kind}" for kind in dict.fromkeys(refused.values()))
        found = _names_and_shapes(tensors) or "no tensor at all"
        raise UsageError(f"{start}it holds no 2-D floating weight (found: {found}{kinds})")
    if key is None:
        listed = _names_and_shapes(matrices)
        raise UsageError(f"{start}2-D weights in it: {listed}; choose one by its key (--weight_key)")
    resembling = nearest(key, [f"{name} {shape_of(entry)}" for name, entry in matrices.items()])
    raise UsageError(f"{start}2-D weights in it, {resembling}")


def _check_weight(where: str, tensor: torch.Tensor) -> None:
    shape = tuple(tensor.shape)
    if tensor.dtype not in (torch.float64, *DTYPES.values()):
        allowed = "float64, float32, float16 or bfloat16"
        raise UsageError(f"{where} has dtype {str(tensor.dtype).removeprefix('torch.')}; {allowed} is needed")
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise UsageError(f"{where} has shape {shape}; a non-empty 2-D weight (out_features, in_features) is needed")
    low, high = torch.aminmax(tensor)  # NaN if any entry is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise NothingToLearn(f"{where} holds NaN or infinite values; finite values are needed")
    if low == high == 0:
        raise NothingToLearn(f"{where} is all zero: there is nothing to learn, and no relative loss")


def save_weight(tensor: torch.Tensor, path) -> None:
    """Save a weight as the suffix says: .pth and .pt hold the tensor, .safetensors names it 'weight', .npy is plain.

    Raises:
        UsageError: unknown suffix, or a dtype that the format lacks (bfloat16 in .npy).
    """
    path = Path(path)
    buffer = io.BytesIO()  # on a full disk, file writers of these libraries raise anything but a plain OSError
    if path.suffix == ".npy":
        if tensor.dtype == torch.bfloat16:
            raise UsageError(f"{path}: .npy has no bfloat16; use .pth or .safetensors")
        np.save(buffer, tensor.numpy())
    elif path.suffix == ".safetensors":
        buffer.write(safetensors.torch.save({"weight": tensor}))
    elif path.suffix in SUFFIXES:
        torch.save(tensor, buffer)
    else:
        raise UsageError(f"{path}: suffix {path.suffix!r} is not known; use one of {', '.join(SUFFIXES)}")
    path.write_bytes(buffer.getbuffer())
