"""Files that are read back: guarded against all that cannot be read, and rows checked by the types of their columns."""

import csv
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ks.errors import UsageError, one_line
from ks.files import columns
from ks.files.columns import Column

MAX_BYTES = 2**28


@contextmanager
def readable(path: Path, what: str) -> Iterator[Path]:
    """Give a path to read; the errors of a file that cannot be read, or is damaged, are one line each.

    Args:
        path: of a JSON or CSV file.
        what: the file should hold, for the message.
    Raises:
        UsageError: no regular file, too large, no text, or not valid.
    """
    try:
        if not path.exists():
            raise UsageError(f"{path} cannot be read: no such file")
        if not path.is_file():  # a FIFO would block
            raise UsageError(f"{path} cannot be read: it is no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES // 2**20} MiB, so it does not hold {what}")
        yield path
    except (msgspec.MsgspecError, RecursionError, csv.Error) as error:
        raise UsageError(f"{path} is not valid: {one_line(error, 200)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read: it is no text") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error


def row_type(declared: Iterable[Column], needed: Collection[str], absent: Any = None) -> type[Struct]:
    """Return the schema of a row.

    Args:
        declared: its columns; other keys are left out.
        needed: names of the columns that must have a value.
        absent: of the other columns: None if they may be null or missing and then have their default, UNSET if they may
            be missing but not null.
    """
    fields, names = [], {}
    for index, column in enumerate(declared):
        names[f"field_{index}"] = column.name  # the name of a metric need not be one of Python's
        default = column.default if absent is None else absent
        optional = (column.type | type(absent), default)
        fields.append((f"field_{index}", *((column.type,) if column.name in needed else optional)))
    return msgspec.defstruct("Row", fields, rename=names, kw_only=True)


def checked_rows(rows: list[dict], declared: Iterable[Column], needed: Collection[str], absent: Any = None) -> list:
    """Return rows as `row_type` takes them; raise msgspec.ValidationError for one that it does not."""
    return msgspec.to_builtins(msgspec.convert(rows, list[row_type(declared, needed, absent)]))  # type: ignore[misc]


def read_summary(path) -> list[dict]:
    """Read PREFIX_summary.json, ours (with a status) or one of the 2025 ksmm scripts.

    Returns:
        the rows with all columns, None where a value is missing, and the columns of metrics.
    Raises:
        UsageError: no regular file, too large, no JSON, or not valid.
    """
    with readable(Path(path), "a summary") as path:
        rows = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
        metrics = columns.metric_columns(columns.summary_metrics(rows))
        return checked_rows(rows, (*columns.SUMMARY, *metrics), ("rank",))


def read_table(
    path,
    declared: Iterable[Column],
    needed: Collection[str],
    filled: Collection[str] | None = None,
    metrics: bool = False,
    what: str = "results",
) -> list[dict]:
    """Read a CSV file with a header and check every row; an empty or non-finite cell has the default of its column.

    Args:
        path: of the file.
        declared: the columns that are read; others are left out.
        needed: names of the columns that the file must have.
        filled: names of the columns that must not be empty; `needed` if None.
        metrics: read every other column whose name a metric can have, too.
        what: the file should hold, for the message.
    Returns:
        one dict per row, with the columns of the file.
    Raises:
        UsageError: no regular file, too large, no CSV, columns missing, or not valid; the message has the line.
    """
    with readable(Path(path), what) as path, open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header = dict.fromkeys(reader.fieldnames or [])
        if missing := [name for name in needed if name not in header]:
            raise UsageError(f"{path} lacks the columns {', '.join(missing)}")
        declared = [column for column in declared if column.name in header]
        if metrics:
            declared += columns.metric_columns(name for name in header if name not in columns.TAKEN)
        kind = row_type(declared, needed if filled is None else filled)
        rows = []
        try:
            for cells in reader:
                if None in cells:
                    raise csv.Error(f"more cells than the {len(header)} of the header")
                known = {name: cell for name, cell in cells.items() if not _is_empty(cell)}
                rows.append(msgspec.to_builtins(msgspec.convert(known, kind, strict=False)))
        except (msgspec.ValidationError, csv.Error) as error:
            raise UsageError(f"{path}, line {reader.line_num}: {one_line(error, 200)}") from error
        return rows


def _is_empty(cell: str | None) -> bool:
    return not cell or cell.strip().lower().lstrip("+-") in ("", "nan", "inf", "infinity")
