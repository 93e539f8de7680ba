"""The lock of a folder: held by one process, ended with it, and never written through a link."""

import fcntl
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from filelock import FileLock, Timeout

from ks.errors import UsageError
from ks.files.ownership import locked

HOLD = """
import sys
from ks.files.ownership import locked
with locked(sys.argv[1], "a test"):
    print(flush=True)
    sys.stdin.read()
"""


NO_LOCKS = """
import errno, fcntl
def refuse(*arguments):
    raise OSError(errno.ENOLCK, "no locks here")
fcntl.flock = refuse
"""


@pytest.fixture(params=["with locks", "without locks"])
def holder(tmp_path, request, monkeypatch):
    """A process that holds the lock until the end of its stdin, on a file system with or without locks."""
    code = HOLD
    if request.param == "without locks":
        code = NO_LOCKS + HOLD
        monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # is put back at the end
        exec(NO_LOCKS, {})
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_the_message_has_the_holder_and_the_holder_keeps_its_lock(tmp_path, holder):
    for _ in range(2):
        with pytest.raises(UsageError, match=rf"in use by another test \(process {holder.pid} on ") as raised:
            locked(tmp_path / ".lock", "another test").__enter__()
        assert "\n" not in str(raised.value)


def test_a_lock_that_is_given_back_is_taken_and_removed(tmp_path, holder):
    giving_back = threading.Timer(0.5, holder.stdin.close)
    giving_back.start()
    with locked(tmp_path / ".lock", "another test", wait=30):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    giving_back.join()
    assert not [*tmp_path.iterdir()]


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path / ".lock", "another test"):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory"])
def test_a_link_or_a_directory_in_the_place_of_the_lock_is_refused(tmp_path, kind):
    lock, target = tmp_path / ".lock", tmp_path / "precious"
    if kind == "directory":
        lock.mkdir()
    else:
        lock.symlink_to(target)
    if kind == "link":
        target.write_text("content")
    with pytest.raises(UsageError, match=r"lock file .*\.lock cannot be opened \(.+\); remove it") as raised:
        locked(lock, "another test").__enter__()
    assert "\n" not in str(raised.value)
    assert lock.is_symlink() == (kind != "directory")
    assert (target.read_text() if target.exists() else None) == ("content" if kind == "link" else None)


def test_a_holder_that_ends_just_then_is_unknown(tmp_path, monkeypatch):
    def acquire(self):
        raise Timeout(self.lock_file)

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(UsageError, match=r"in use by another test \(unknown\)"):
        locked(tmp_path / ".lock", "another test").__enter__()
