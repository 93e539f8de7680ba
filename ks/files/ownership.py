"""Who may write in a folder: one process at a time, and only over files that a record there lists as the toolkit's.

A record is a JSON config with the names under `files`: `PREFIX_config.json` of a run or a sweep, or
`PREFIX_figures.json` of a plot. Everything else in a folder is the user's, and so is whatever a symbolic link leads to.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from filelock import LeaseCompromise, OwnerRecord, SoftFileLease, Timeout

from ks.errors import UsageError
from ks.files.atomic import read_json_object

LEASE_SECONDS = 30.0  # all processes that use a folder must agree on it


def recorded(record: Path, without_list: Iterable[Path] = ()) -> set[Path]:
    """Return the paths that a record lists as written by this toolkit, and the record itself.

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
            raise UsageError(f"{path} is in the way: no record lists it as the toolkit's; move it, or {remedy}")


def delete(paths: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Delete owned files; links, folders and files that are read stay."""
    read = {path.resolve() for path in inputs}
    for path in paths:
        if path.is_file() and not path.is_symlink() and path.resolve() not in read:
            path.unlink()


@contextlib.contextmanager
def locked(path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file that has host and process, and whose date shows every ten seconds that the process lives.

    It needs nothing of a file system but that two processes cannot both create a file: flock is missing on some network
    file systems, and on others each host sees its own locks alone. The lock of a process that has ended is taken over,
    at once on its own host, and elsewhere when the file has not changed for LEASE_SECONDS, as after the loss of a node.
    A process that was suspended for so long, and whose lock another one took, is interrupted.

    Args:
        path: of the lock file, in an existing folder.
        what: kind of process that may hold it, for the message.
        wait: seconds to wait for a process that is known to live.
    Raises:
        UsageError: another process holds it, or something else is in its place.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path} is in the place of a lock file; remove it")
    lock = SoftFileLease(path, lease_duration=LEASE_SECONDS, on_compromise=_interrupt)
    try:
        _acquire(lock, wait)
    except Timeout as error:
        if lock.owner is None:
            message = f"{path} is no complete lock file; delete it if no process works in this folder"
        else:
            message = f"{path.parent} is in use by {what} ({_holder(lock)}); wait for it or choose another folder"
        raise UsageError(message) from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # in a folder that has become read-only the file stays
            lock.release()


def _acquire(lock: SoftFileLease, wait: float) -> None:
    """Acquire a lock; one whose holder runs elsewhere, if at all, is watched until its lease may have ended.

    filelock takes a lock over by exchanging two files, which NFS and Lustre cannot: there the file is removed here.
    """
    try:
        lock.acquire(timeout=0)
        return
    except Timeout as error:
        owner, date = lock.owner, _date_of(lock)
        elsewhere = owner is None or "this host cannot probe" in str(error)
    if owner and not elsewhere and _runs(owner.pid):
        lock.acquire(timeout=wait)
        return
    if elsewhere:
        seconds = 1.2 * LEASE_SECONDS
        print(f"waiting up to {seconds:.0f} s, whether {_holder(lock)} still holds {lock.lock_file}", file=sys.stderr)
        try:
            lock.acquire(timeout=seconds, poll_interval=min(1.0, LEASE_SECONDS / 10))
            return
        except Timeout:
            if owner is None or _date_of(lock) != date:
                raise
    _remove(lock.lock_file, owner)
    lock.acquire(timeout=0)


def _date_of(lock: SoftFileLease) -> int | None:
    with contextlib.suppress(FileNotFoundError):  # it has been given back just now
        return os.stat(lock.lock_file).st_mtime_ns
    return None


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _remove(path: str, owner: OwnerRecord | None) -> None:
    """Remove the lock file of an owner that has ended; the file of a process that was faster stays."""
    aside = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        os.rename(path, aside)
        try:
            if SoftFileLease(aside).owner != owner:
                os.link(aside, path)
        finally:
            os.unlink(aside)


def _holder(lock: SoftFileLease) -> str:
    """Return the holder of a lock in words; its host is without the number of its process namespace."""
    owner = lock.owner
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "an unknown process"


def _interrupt(loss: LeaseCompromise) -> None:
    if loss.reason == "owner-changed":
        print(f"{loss.lock_file} was taken by another process while this one was suspended", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
