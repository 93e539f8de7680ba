"""Who may write in a folder: one process at a time, and only over files that a record there names as the toolkit's.

A record is a JSON config with the names under `files`: `PREFIX_config.json` of a run or a sweep, or
`PREFIX_figures.json` of a plot. Everything else in a folder is the user's, and so is whatever a symbolic link leads to.
"""

import contextlib
import errno
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ks.errors import UsageError
from ks.files.atomic import read_json_object

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system without locks


def recorded(record: Path, without_list: Iterable[Path] = ()) -> set[Path]:
    """Return the paths that a record names as written by this toolkit, and the record itself.

    Args:
        record: path of the record; if it is missing or damaged, nothing is known to be ours.
        without_list: the files of a record of version 0.1.0 or older, which lists none.
    """
    content = {} if record.is_symlink() else read_json_object(record)
    names = content.get("files")
    if isinstance(names, list):
        return {record, *(record.parent / name for name in names if _stays_inside(record.parent, name))}
    return {record, *without_list} if {"settings", "provenance"} <= content.keys() else set()


def _stays_inside(folder: Path, name: object) -> bool:
    """Return whether a name leads to a place below the folder, and not through a linked folder."""
    if not isinstance(name, str) or "\0" in name or not name:
        return False
    path = PurePosixPath(name)
    links = any((folder / inside).is_symlink() for inside in path.parents if inside.name)
    return not (path.is_absolute() or ".." in path.parts or links)


def check_free(paths: Iterable[Path], owned: set[Path], inputs: Iterable[Path], remedy: str) -> None:
    """Check that files can be written without losing anything of the user's.

    Args:
        paths: to be written.
        owned: that this toolkit may overwrite.
        inputs: files that are read.
        remedy: what to do about a file in the way.
    Raises:
        UsageError: a file in the way that this toolkit did not write, a symbolic link, or an input.
    """
    read = {path.resolve() for path in inputs}
    for path in paths:
        if path.resolve() in read:
            raise UsageError(f"{path} is read and would be overwritten; {remedy}")
        if path.is_symlink():
            raise UsageError(f"{path} is a symbolic link, and nothing is written through one; remove it, or {remedy}")
        if path.exists() and (path not in owned or not path.is_file()):
            raise UsageError(f"{path} is in the way: no record says that this toolkit wrote it; move it, or {remedy}")


def delete(paths: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Delete owned files; links, folders and files that are read stay."""
    read = {path.resolve() for path in inputs}
    for path in paths:
        if path.is_file() and not path.is_symlink() and path.resolve() not in read:
            path.unlink()


@contextlib.contextmanager
def locked(path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file; a lock that a killed process left is taken over, a symbolic link is refused.

    File systems without locks (some NFS and Lustre) get a file PATH.soft instead, which names host and process; one
    whose process has ended is taken over on the same host.

    Args:
        path: of the lock file, in an existing folder.
        what: kind of process that may hold it, for the message.
        wait: seconds to try.
    Raises:
        UsageError: another process holds it, or it cannot be opened.
    """
    path = Path(path)
    try:
        lock = _acquired(path, wait)
    except Timeout as error:
        holder = ""
        with contextlib.suppress(OSError):  # it may have ended just now
            holder = path.read_text("utf-8", errors="replace").strip()
        raise UsageError(
            f"{path.parent} is in use by {what} ({holder or 'unknown'}); wait for it or choose another folder"
        ) from error
    except OSError as error:
        raise UsageError(f"lock file {path} cannot be opened ({error.strerror}); remove it") from error
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name in it
            path.write_text(f"process {os.getpid()} on {platform.node()}", "utf-8")
        yield
    finally:
        # Deleting the file before the lock is given up is safe: a process that waited for this file compares its inode
        # with that of the path once it has the lock, and tries again (filelock 3.30 and later).
        with contextlib.suppress(OSError):  # in a folder that has become read-only the file stays, without a lock
            path.unlink(missing_ok=True)
        lock.release()


def _acquired(path: Path, wait: float) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path, timeout=wait)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        lock = SoftFileLock(f"{path}.soft", timeout=wait)
        lock.acquire()
    return lock
