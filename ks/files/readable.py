"""Guard of every JSON or CSV file that is read back: a regular file of a sane size, and each error in one line."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ks.errors import UsageError, one_line

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
