"""The lock of a folder: held by one process, ended with it wherever it ran, and never written through a link."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, wait_for
from filelock import SoftFileLease

from ks.errors import UsageError
from ks.files import ownership
from ks.files.ownership import locked

# With an argument, the process seems to run on another host, and it has a lease of two seconds.
HOLD = """
import socket, sys
from ks.files import ownership
path, host, *_ = *sys.argv[1:], ""
if host:
    socket.gethostname = lambda: host
    ownership.LEASE_SECONDS = 2.0
with ownership.locked(path, "a test"):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["exchanges files", "cannot exchange files"])
def file_system(request, monkeypatch):
    """One that exchanges two files, as filelock does to take a lock over, and one that cannot, such as NFS."""
    if request.param.startswith("cannot"):
        monkeypatch.setattr("filelock._soft.exchange_names", lambda *names: False)


@pytest.fixture
def lease(monkeypatch):
    """A lease of two seconds."""
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 2.0)


@pytest.fixture
def hold(tmp_path):
    """Start processes that hold the lock until the end of their stdin."""
    processes = []

    def start(*host):
        command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock"), *host]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        processes[-1].stdout.readline()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        with process:  # closes its pipes
            pass


def is_ours(path) -> bool:
    return SoftFileLease(path).owner.pid == os.getpid() and [*path.parent.iterdir()] == [path]


def test_the_message_has_the_holder_and_the_holder_keeps_its_lock(tmp_path, hold):
    holder = hold()
    for _ in range(2):
        with pytest.raises(UsageError, match=rf"in use by another test \(process {holder.pid} on ") as raised:
            locked(tmp_path / ".lock", "another test").__enter__()
        assert "\n" not in str(raised.value)


def test_a_lock_that_is_given_back_is_taken_and_removed(tmp_path, hold):
    giving_back = threading.Timer(0.5, hold().stdin.close)
    giving_back.start()
    with locked(tmp_path / ".lock", "another test", wait=30):
        assert is_ours(tmp_path / ".lock")
    giving_back.join()
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("file_system")
def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, hold, capsys):
    holder = hold()
    holder.kill()
    holder.wait()
    with locked(tmp_path / ".lock", "another test"):
        assert is_ours(tmp_path / ".lock")
    assert capsys.readouterr().err == ""  # it has not waited


def test_a_lock_that_another_process_has_taken_over_first_is_left_to_it(tmp_path):
    with locked(tmp_path / ".lock", "a test"):
        owner = SoftFileLease(tmp_path / ".lock").owner
        ownership._remove(str(tmp_path / ".lock"), owner._replace(token="0"))
        assert is_ours(tmp_path / ".lock")


def test_no_lock_of_the_file_system_is_used(tmp_path, monkeypatch):
    """flock fails on some file systems; on others it succeeds on every host."""
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", lambda *arguments: pytest.fail("flock"))
    with locked(tmp_path / ".lock", "a test"), pytest.raises(UsageError, match="in use by another test"):
        locked(tmp_path / ".lock", "another test").__enter__()


@pytest.mark.usefixtures("file_system", "lease")
def test_a_process_on_another_host_keeps_its_lock_while_it_lives(tmp_path, hold, capsys):
    holder = hold("node7")
    with pytest.raises(UsageError, match=rf"in use by another test \(process {holder.pid} on node7\); wait for it"):
        locked(tmp_path / ".lock", "another test").__enter__()
    waiting = f"waiting up to 2 s, whether process {holder.pid} on node7 still holds {tmp_path / '.lock'}\n"
    assert capsys.readouterr().err == waiting


@pytest.mark.usefixtures("file_system", "lease")
def test_the_lock_of_a_lost_node_is_taken_over_when_the_lease_has_ended(tmp_path, hold):
    holder = hold("node7")
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with locked(tmp_path / ".lock", "another test"):
        assert time.monotonic() - started >= 2
        assert is_ours(tmp_path / ".lock")


@pytest.mark.usefixtures("lease")
def test_a_process_whose_lock_was_taken_while_it_was_suspended_is_interrupted(tmp_path, hold):
    holder = hold("node7")
    holder.send_signal(signal.SIGSTOP)
    with locked(tmp_path / ".lock", "another test"):
        holder.send_signal(signal.SIGCONT)
        wait_for(lambda: holder.poll() is not None)
        assert is_ours(tmp_path / ".lock")
    assert holder.returncode == -signal.SIGTERM
    assert holder.stderr.read() == f"{tmp_path / '.lock'} was taken by another process while this one was suspended\n"


def test_the_lock_of_an_earlier_version_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_text("process 12 on a host of version 0.1.0")
    with locked(tmp_path / ".lock", "another test", wait=30):
        assert is_ours(tmp_path / ".lock")


@pytest.mark.usefixtures("lease")
def test_an_empty_file_may_be_deleted(tmp_path):
    """Its process may be about to write its name, so it is not taken over."""
    (tmp_path / ".lock").touch()
    with pytest.raises(UsageError, match=r"\.lock is no complete lock file; delete it if no process works in this"):
        locked(tmp_path / ".lock", "another test").__enter__()


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory"])
def test_a_link_or_a_directory_in_the_place_of_the_lock_is_refused(tmp_path, kind):
    lock, target = tmp_path / ".lock", tmp_path / "precious"
    if kind == "link":
        target.write_text("content")
    lock.mkdir() if kind == "directory" else lock.symlink_to(target)
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"\.lock is in the place of a lock file; remove it$"):
        locked(lock, "another test").__enter__()
    assert {path: path.lstat() for path in tmp_path.iterdir()} == before


def test_a_folder_that_vanishes_under_its_lock_is_left_in_peace(tmp_path):
    (tmp_path / "folder").mkdir()
    with locked(tmp_path / "folder" / ".lock", "a test"):
        shutil.rmtree(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
