"""The folder of a saved model: replaced as a whole and only if it is ours; its tensors in one file or in several."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ks import signals
from ks.errors import UsageError, one_line
from ks.files.atomic import write_json, write_safetensors
from ks.files.memory import check_fits
from ks.files.schema import CheckpointIndex, CompressedModel, read_json_as
from ks.files.weights import INDEX_SUFFIX, entries_of

RECORD_FILE, CARD_FILE, DENSE_FILE = "compressed.json", "README.md", "model.safetensors"
CHAINS_FILE = "compressed.safetensors"  # from_pretrained would take model.safetensors and start the chains anew
MODEL_FORMAT, MODEL_VERSION = "ks_compressed_model", 3  # 1 has factors.l, 2 model.safetensors and no list of files


def read_record(folder: Path) -> CompressedModel:
    """Read compressed.json.

    Raises:
        UsageError: no folder, or none of `ks.save_compressed`, or of a newer version.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; a folder of ks.save_compressed is needed")
    record = read_json_as(folder / RECORD_FILE, CompressedModel, "a compressed model")
    if record.format != MODEL_FORMAT:
        raise UsageError(f"{folder / RECORD_FILE} is no compressed model; a folder of ks.save_compressed is needed")
    if record.version > MODEL_VERSION:
        raise UsageError(f"{folder} has version {record.version}; {MODEL_VERSION} is the newest known, update ks")
    return record


def check_replaceable(folder: Path) -> None:
    """Check that a folder is new, empty, or one of ours without files of the user."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a symbolic link, and nothing is written through one; choose another folder")
    if not folder.exists():
        return
    names = entries_in(folder) if folder.is_dir() else []
    if RECORD_FILE in names:
        ours = {RECORD_FILE, *(read_record(folder).files or [DENSE_FILE])}
        names = [name for name in names if name not in ours]
    if names or not folder.is_dir():
        found = f"holds {one_line(', '.join(names[:3]))}" if names else "is no folder"
        raise UsageError(f"{folder} {found}; choose a new or an empty folder, or one that ks.save_compressed wrote")


def entries_in(folder: Path) -> list[str]:
    """Return the paths of all that a folder holds at any depth, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a folder beside, which takes the place of `folder` at the end, unless an exception is raised."""
    temporary, before = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        with signals.deferred():
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                temporary.mkdir()
                yield temporary
                if folder.exists():
                    folder.rename(before)
                temporary.rename(folder)
            except OSError:
                if before.exists():
                    before.rename(folder)
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({one_line(error, 200)})") from error


def write_tensors(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int) -> None:
    """Write tensors into a file, or into several beside it with an index; one file at a time is in memory.

    Args:
        path: CHAINS_FILE or DENSE_FILE in its folder.
        tensors: with their names.
        max_shard_size: of a file, in bytes; a tensor that exceeds it has a file of its own.
    """
    names_in: list[list[str]] = []  # of the tensors of each file
    size = 0
    for shard in _shards(tensors, max_shard_size):
        names_in.append([*shard])
        size += sum(tensor.nbytes for tensor in shard.values())
        write_safetensors(path.with_name(f"{len(names_in)}.safetensors"), shard, {"format": "pt"})
    count, file_of = len(names_in), dict[str, str]()
    for number, names in enumerate(names_in, 1):
        file = path.name if count == 1 else f"{path.stem}-{number:05}-of-{count:05}.safetensors"
        path.with_name(f"{number}.safetensors").rename(path.with_name(file))
        file_of |= dict.fromkeys(names, file)
    if count > 1:
        write_json(path.with_name(path.name + INDEX_SUFFIX), {"metadata": {"total_size": size}, "weight_map": file_of})


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield copies of tensors in groups of at most a size in bytes; each group is empty afterwards."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_size:
            yield shard
            shard.clear()
            size = 0
        # on the CPU in memory of its own, as the file needs it
        shard[name] = tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        size += tensor.nbytes
    yield shard


def stored_tensors(folder: Path, version: int) -> dict:
    """Return the entries of all tensors in a folder, as `ks.files.weights.entries_of` does; none is read yet.

    Raises:
        UsageError: a file is missing, damaged, or no .safetensors; or they exceed the memory.
    """
    file = CHAINS_FILE if version > 2 else DENSE_FILE
    index, names = folder / file, {file}
    if (folder / (file + INDEX_SUFFIX)).exists():
        index = folder / (file + INDEX_SUFFIX)
        names = set(read_json_as(index, CheckpointIndex, "the index of a checkpoint").weight_map.values())
        if others := sorted(name for name in names if not name.endswith(".safetensors")):
            raise UsageError(f"{index} lists {one_line(others[0])!r}; only .safetensors files are read")
    entries = entries_of(index, "a compressed model")
    check_fits(str(folder), sum((folder / name).stat().st_size for name in names), "use a machine with more memory")
    return entries
