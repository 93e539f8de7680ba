"""Start runs as forks of a process that has imported torch, so that one import serves all runs of a sweep.

The sweep forks the server before it has a thread, a GPU or anything of its study in memory. For each run the server
forks a process that runs the script as a fresh interpreter would: the script and whatever it imports besides the
libraries and this package are read from disk. The run is a child of the sweep, like one that `start_afresh` starts: it
is forked twice, and the sweep adopts it when the process between ends. The server ends with the sweep.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import itertools
import json
import os
import signal
import socket
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ks.cli.console import note
from ks.study.processes import SET_PARENT_DEATH_SIGNAL, Process, Start, start_afresh

SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux' prctl
LARGEST_REQUEST = 2**20
LAST_DESCRIPTOR = 2**20
RUNS_NEED = ("ks.training.recorder", "ks.training.samples", "ks.training.steps", "ks.training.trainable_chain")


def unsafe_to_fork(is_script: bool) -> str:
    """Return why runs cannot be forks of this process; empty if they can.

    Args:
        is_script: whether this process runs a script from its beginning, instead of calling its main function.
    """
    if sys.platform != "linux":
        return "only Linux lets a sweep adopt them"
    if not is_script or sys.orig_argv[1:2] != sys.argv[:1]:
        return "Python was given options, or another program runs this script"
    monitoring = getattr(sys, "monitoring", None)  # since Python 3.12
    if sys.gettrace() or sys.getprofile() or (monitoring and any(map(monitoring.get_tool, range(6)))):
        return "a debugger or a profiler watches this process"
    if torch.cuda.is_initialized() or len(os.listdir("/proc/self/task")) > 1:
        return "this process has threads or a GPU"
    return ""


@contextlib.contextmanager
def starting_runs(is_script: bool, verbose: bool) -> Iterator[Start]:
    """Return how a sweep starts its runs: by a server, or afresh where a fork is not safe."""
    if reason := unsafe_to_fork(is_script):
        note(f"every run imports torch itself: {reason}", quiet=not verbose)
        yield start_afresh
        return
    note("torch is imported once: runs are forks of a process that has it", quiet=not verbose)
    with contextlib.closing(ForkServer()) as server:
        yield server.start


class Forked(Process):
    """A child of this process that was not started by `subprocess`."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkServer:
    """A fork of this process that waits for commands; ended by `close`, and with this process."""

    def __init__(self):
        self._socket, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # else every fork would have what is in the buffers
        self._pid = os.fork()
        if not self._pid:
            try:
                self._socket.close()
                _become_server(requests)
            finally:
                os._exit(1)
        requests.close()

    def start(
        self, command: Sequence[str], environment: dict[str, str], stdout: int, stderr: int, kept: Sequence[int] = ()
    ) -> Process:
        """Start a script as `start_afresh` does; afresh if the server has ended."""
        request = json.dumps([[*command], environment, [1, 2, *kept]]).encode()
        prctl = ctypes.CDLL(None).prctl
        prctl(SET_CHILD_SUBREAPER, 1)  # for this moment alone: other orphans go where they always go
        try:
            socket.send_fds(self._socket, [request], [stdout, stderr, *kept])
            pid = int(self._socket.recv(32))
            self._socket.recv(32)  # the process between has ended
            return Forked(pid)
        except (OSError, ValueError) as error:
            note(f"every run imports torch itself from now on, because none could be forked: {error}")
            self._socket.close()
            return start_afresh(command, environment, stdout, stderr, kept)
        finally:
            prctl(SET_CHILD_SUBREAPER, 0)

    def close(self) -> None:
        self._socket.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _become_server(requests: socket.socket) -> None:
    """Fork a run for every request, until the sweep closes its end or ends."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    os.setsid()  # signals of the terminal are for the sweep
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for module in RUNS_NEED:
        importlib.import_module(module)
    gc.freeze()  # a fork would copy what a collection touches
    while True:
        content, descriptors, *_ = socket.recv_fds(requests, LARGEST_REQUEST, 16)
        if not content:
            os._exit(0)
        try:
            between = os.fork()
            if not between:
                pid = os.fork()
                if not pid:
                    command, environment, places = json.loads(content)
                    become(command, environment, places, descriptors)
                requests.send(b"%d" % pid)
                os._exit(0)
            os.waitpid(between, 0)
            requests.send(b"ended")
        except OSError as error:
            requests.send(str(error).encode())
        for descriptor in descriptors:
            os.close(descriptor)


def become(command: list[str], environment: dict[str, str], places: list[int], descriptors: list[int]) -> None:
    """Turn this process, which was just forked, into that of a script; never returns.

    Args:
        command: an interpreter, which is this one, a script and its arguments.
        environment: of the script.
        places, descriptors: the number of each file that the script has besides stdin, and its number here.
    """
    code: Any = 1
    try:
        os.setsid()
        _place([os.open(os.devnull, os.O_RDONLY), *descriptors], [0, *places])
        if (threads := environment.get("OMP_NUM_THREADS")) != os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads or 1))  # OpenMP has read the other one
        os.environ.clear()
        os.environ.update(environment)
        _, script, *_ = sys.orig_argv = command
        sys.argv = command[1:]
        del sys.path[0]  # the folder that the script of the sweep has put there
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(script)
        importlib.invalidate_caches()
        sys.stdin = open(0, encoding=sys.stdin.encoding, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = _stream(1, sys.stdout, "strict"), _stream(2, sys.stderr, "backslashreplace")
        for name in ("stdin", "stdout", "stderr"):
            setattr(sys, f"__{name}__", getattr(sys, name))
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = script
        exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)
        code = 0
    except SystemExit as left:
        code = left.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        frames = error.__traceback__ and error.__traceback__.tb_next  # without that of this function
        sys.excepthook(type(error), error, frames)
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # waits for the script's own threads
            atexit._run_exitfuncs()
            sys.stdout.flush()
        os._exit(code or 0)


def _place(descriptors: list[int], places: list[int]) -> None:
    """Give files their numbers, and close all others."""
    copies = [os.dup(descriptor) for descriptor in descriptors]  # no number is both free and taken
    while any(copy in places for copy in copies):
        copies = [os.dup(copy) for copy in copies]
    for copy, place in zip(copies, places, strict=True):
        os.dup2(copy, place)
    numbers = [*sorted(places), LAST_DESCRIPTOR]
    for before, place in itertools.pairwise(numbers):
        if before + 1 < place:  # os.closerange of none closes all
            os.closerange(before + 1, place)


def _stream(number: int, before: Any, errors: str) -> io.TextIOWrapper:
    """Return a standard stream as a fresh interpreter opens it; `before` is that of the sweep."""
    unbuffered = before.write_through  # with PYTHONUNBUFFERED
    file = open(number, "wb", 0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(file, before.encoding, errors, line_buffering=number == 2, write_through=unbuffered)
