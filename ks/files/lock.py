"""One process at a time in a folder: a lock of the operating system, which ends with the process that holds it."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ks.errors import UsageError


@contextlib.contextmanager
def locked(path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file; a lock that a killed process left is taken over, a symbolic link is refused.

    Args:
        path: of the lock file, in an existing folder.
        what: kind of process that may hold it, for the message.
        wait: seconds to try.
    Raises:
        UsageError: another process holds it, or it cannot be opened.
    """
    path = Path(path)
    lock = FileLock(path, timeout=wait)
    try:
        lock.acquire()
    except Timeout as error:
        holder = ""
        with contextlib.suppress(OSError):  # it may have ended just now
            holder = path.read_text(errors="replace").strip()
        raise UsageError(
            f"{path.parent} is in use by {what} ({holder or 'unknown'}); wait for it or choose another folder"
        ) from error
    except OSError as error:
        raise UsageError(f"lock file {path} cannot be opened ({error.strerror}); remove it") from error
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name in it
            path.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        # Deleting the file before the lock is given up is safe: a process that waited for this file compares its inode
        # with that of the path once it has the lock, and tries again (filelock 3.30 and later).
        with contextlib.suppress(OSError):  # in a folder that has become read-only the file stays, without a lock
            path.unlink(missing_ok=True)
        lock.release()
