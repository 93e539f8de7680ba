"""Start runs as forks of a process that has imported torch, so that one import serves all runs of a sweep.

The sweep forks the server before it has a thread, a GPU or anything of its study in memory. A run reads its script, and
what that imports besides libraries and this package, from disk. It is a child of the sweep: it is forked twice, and the
sweep adopts it when the process between ends.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from ks.cli.console import note
from ks.cli.flags import SweepConfig
from ks.study.forked_script import run_script
from ks.study.processes import SET_PARENT_DEATH_SIGNAL, Process, Start, start_afresh

SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux' prctl
LARGEST = 2**20  # bytes of a request
RUNS_NEED = ("ks.training.recorder", "ks.training.samples", "ks.training.steps", "ks.training.trainable_chain")


def unsafe_to_fork(is_script: bool) -> str:
    """Return why runs cannot be forks, or nothing; see `starting_runs`."""
    monitoring = getattr(sys, "monitoring", None)  # since Python 3.12
    if sys.platform != "linux":
        return "only on Linux can a sweep adopt a run"
    if not is_script or sys.orig_argv[1:2] != sys.argv[:1]:
        return "Python was given options, or another program runs the sweep"
    if sys.gettrace() or sys.getprofile() or (monitoring and any(map(monitoring.get_tool, range(6)))):
        return "a debugger or a profiler watches the sweep"
    if torch.cuda.is_initialized() or len(os.listdir("/proc/self/task")) > 1:
        return "the sweep has threads or a GPU"
    return ""


@contextlib.contextmanager
def starting_runs(config: SweepConfig, is_script: bool) -> Iterator[Start]:
    """Return how a sweep starts its runs on this machine: by a server, or afresh where a fork is not safe.

    Args:
        is_script: whether a script runs, not a call of its main.
    """
    if config.dry_run or config.launcher != "local":
        yield start_afresh
    elif reason := unsafe_to_fork(is_script):
        note(f"every run imports torch itself: {reason}", quiet=not config.verbose)
        yield start_afresh
    else:
        note("torch is imported once: runs are forks of a process that has it", quiet=not config.verbose)
        with contextlib.closing(ForkServer()) as server:
            yield server.start


class Forked(Process):
    """A child of this process that `subprocess` has not started."""

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
                for module in RUNS_NEED:
                    importlib.import_module(module)
                serve(requests, _run)
            finally:
                os._exit(1)
        requests.close()

    def start(
        self, command: Sequence[str], environment: dict[str, str], stdout: int, stderr: int, kept: Sequence[int]
    ) -> Process:
        """Start a script as `start_afresh` does; afresh if the server has ended."""
        request = json.dumps([[*command], environment, [0, 1, 2, *kept]]).encode()
        try:
            with open(os.devnull, "rb") as stdin:
                return Forked(forked(self._socket, request, [stdin.fileno(), stdout, stderr, *kept]))
        except (OSError, ValueError):
            self._socket.close()
            note("a run imports torch itself, because it could not be forked")
            return start_afresh(command, environment, stdout, stderr, kept)

    def close(self) -> None:
        self._socket.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def forked(server: socket.socket, request: bytes, descriptors: list[int]) -> int:
    """Return the process that a server has forked for a request, a child of this process now."""
    prctl = ctypes.CDLL(None).prctl
    prctl(SET_CHILD_SUBREAPER, 1)  # for this moment alone: other orphans go where they always go
    try:
        socket.send_fds(server, [request], descriptors)
        pid = int(server.recv(LARGEST))
        server.recv(LARGEST)  # the process between has ended
    finally:
        prctl(SET_CHILD_SUBREAPER, 0)
    return pid


def serve(requests: socket.socket, become: Callable[[bytes, list[int]], None]) -> None:
    """Fork for every request and call `become`, which never returns, until the other end closes or the parent ends."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    os.setsid()  # signals of the terminal are for the parent
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # a fork would copy what a collection touches
    while True:
        request, descriptors, *_ = socket.recv_fds(requests, LARGEST, 16)
        if not request:
            os._exit(0)
        if not (between := os.fork()):
            if not (pid := os.fork()):
                become(request, descriptors)
            requests.send(b"%d" % pid)
            os._exit(0)
        os.waitpid(between, 0)
        requests.send(b"ended")
        for descriptor in descriptors:
            os.close(descriptor)


def _run(request: bytes, descriptors: list[int]) -> None:
    os.setsid()
    command, environment, places = json.loads(request)
    if (threads := environment.get("OMP_NUM_THREADS")) != os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads or 1))  # OpenMP has read the other one
    torch.default_generator.seed()  # else all runs would draw alike
    run_script(command, environment, places, descriptors)
