"""Files that are written whole or not at all: JSON without NaN, CSV, tensors; and folders that can be written."""

import csv
import glob
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ks import signals
from ks.errors import UsageError, one_line


@contextmanager
def atomic_path(path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; at the end it replaces `path`, unless an exception is raised.

    No interrupt comes in between. An OSError has the name of `path`; that of a write on a full disk comes without one.
    """
    path = Path(path)
    temporary = path.with_name(_temporary_name(path, os.getpid()))
    with signals.deferred():
        try:
            yield temporary
            os.replace(temporary, path)
        except OSError as error:
            if error.errno is not None:  # the message of a library has no place for the name
                error.filename = str(path)
            raise
        finally:
            with suppress(OSError):  # in a folder that has become read-only
                temporary.unlink(missing_ok=True)


def _temporary_name(path: Path, process: int | str) -> str:
    return f".{path.stem}.{process}.tmp{path.suffix}"


def delete_leftovers(paths: Iterable[Path]) -> None:
    """Delete the temporary files that killed processes left beside these paths; only the holder of their lock may."""
    for path in paths:
        before, after = _temporary_name(path, "*").split("*")
        for found in path.parent.glob(glob.escape(before) + "*" + glob.escape(after)):
            process = found.name.removeprefix(before).removesuffix(after)
            if process.isascii() and process.isdigit() and found.is_file() and not found.is_symlink():
                found.unlink()


def finite(value: Any) -> Any:
    """Replace every NaN or infinity in a value by None: null in JSON, an empty cell in CSV."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


def save_tensors(value: Any, path) -> None:
    """Write torch.save(value) atomically; a full disk raises OSError."""
    import torch

    buffer = io.BytesIO()  # torch's own file writer raises an unspecific RuntimeError
    torch.save(value, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_safetensors(path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write tensors and metadata as .safetensors atomically; whatever prevents it raises OSError."""
    import safetensors.torch

    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the library lets nobody but the user read its files
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # a missing folder or a full disk
            raise OSError(one_line(error, 200)) from error
        temporary.chmod(mode)


def write_json(path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=2, allow_nan=False, default=str) + "\n", "utf-8")


def write_csv(path, columns: Iterable[str], rows: Iterable[dict]) -> None:
    """Write dicts as CSV atomically; missing, None and non-finite cells are empty."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in finite(row).items()} for row in rows)


def _cell(value: Any) -> Any:
    """Return a value for CSV: text in one line, with an apostrophe before what a spreadsheet would run as a formula."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = one_line(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def read_json(path) -> Any:
    """Parse a JSON file; return None if it is missing, broken or no regular file (a FIFO would block)."""
    try:
        return json.loads(Path(path).read_text("utf-8")) if Path(path).is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def read_json_object(path) -> dict:
    """Parse a JSON file; return an empty dict if it is missing, broken or no object."""
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def prepare_output_dir(path) -> Path:
    """Create a folder if needed, and check that it can be written.

    Returns:
        the absolute path.
    Raises:
        UsageError: it cannot be created or written; the message has the reason.
    """
    path = Path(path).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"output folder {path} cannot be written: {error.strerror}") from error
    return path
