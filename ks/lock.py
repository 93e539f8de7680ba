"""One process at a time in a folder: a lock of the operating system, which ends with the process that holds it."""

import fcntl
import os
import platform
import time
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path, what: str, wait: float = 0.0):
    """Hold the lock file `path`; it is removed at the end, and one that a killed process left is taken over.

    Args:
        path: of the lock file, in an existing folder.
        what: what else may hold it, for the message.
        wait: seconds to try.
    Raises:
        ValueError: another process holds it.
    """
    path = Path(path)
    deadline = time.monotonic() + wait
    while (file := _try(path)) is None:
        if time.monotonic() >= deadline:
            holder = path.read_text().strip() if path.exists() else "unknown"
            raise ValueError(f"{path.parent} is in use by {what} ({holder}); wait for it or choose another folder")
        time.sleep(0.1)
    try:
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _try(path: Path):
    file = open(path, "a+")  # noqa: SIM115, it outlives this function
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder may have removed it between our opening and locking it.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            file.truncate(0)
            return file
    except BlockingIOError:
        pass
    file.close()
    return None
