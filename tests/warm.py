"""Start scripts as forks of a process that has loaded torch, because imports take most of the time of a test.

A test starts a script with `subprocess`, as a user's shell would. The fixture `nursery` of conftest.py replaces the
system call below it: a `Nursery`, which has loaded the libraries and nothing of this project, forks the script. A
script that starts scripts itself, as a sweep does, forks itself for them. Outside Linux, and for any command but
`python SCRIPT.py ...` in the test's own environment, processes start as usual.
Forked scripts save empty pictures. Tests of pictures, of start-up or of command lines use the fixture `cold`.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

LIBRARIES = [
    *("torch", "safetensors.torch", "scipy.linalg", "pandas", "msgspec", "filelock"),
    *("matplotlib.figure", "matplotlib.ticker", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
]
SET_BY_A_SWEEP = {"CUDA_VISIBLE_DEVICES", "KS_LIFELINE", "OMP_NUM_THREADS"}  # for its runs; read after the imports
SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux' prctl
OUT_OF_THE_WAY = 1000  # descriptors from here on are in no script's way
start_cold = subprocess._fork_exec  # type: ignore[attr-defined]


class FileSizeLimit:
    """A preexec_fn after which no file can grow beyond a number of bytes: it stands in for a full disk."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def request_of(args, keep, cwd, env, rest):
    """Return the arguments of `become` for those of `subprocess._fork_exec`, or None if the command is no script."""
    stdin, _, _, stdout, _, stderr, _, errors, _, new_session, *_, preexec = rest[:16]
    given = dict(os.environ) if env is None else dict(os.fsdecode(entry).split("=", 1) for entry in env)
    changed = {name for name in {*given} | {*os.environ} if given.get(name) != os.environ.get(name)}
    command = [*map(os.fsdecode, args)]
    is_script = command[0] == sys.executable and command[1:] and command[1].endswith(".py")
    if not is_script or not isinstance(preexec, FileSizeLimit | None):
        return None
    if not changed <= SET_BY_A_SWEEP or given.get("OMP_NUM_THREADS") != "1":
        return None
    # -1 stands for this process's own stream
    places = {number: own if own != -1 else number for number, own in enumerate((stdin, stdout, stderr))}
    places |= {number: number for number in {*keep} - {errors}}
    return command, os.fsdecode(cwd or os.getcwd()), given, bool(new_session), preexec and preexec.size, places


def become(args, cwd, env, new_session, largest_file, places) -> None:
    """Turn this process, which was just forked, into that of a script; never returns.

    Args:
        args: the command, `[python, SCRIPT.py, ...]`.
        cwd, env: its working directory and environment.
        new_session: whether it leads a session of its own.
        largest_file: the limit on its files in bytes, or None.
        places: for each of its descriptors the one of this process that goes there.
    """
    code = 1
    try:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if new_session:
            os.setsid()
        if largest_file is not None:
            FileSizeLimit(largest_file)()
            env["GIT_DIR"] = os.devnull  # git, ended by the limit, would leave its lock in the checkout
        copies = {place: fcntl.fcntl(own, fcntl.F_DUPFD, OUT_OF_THE_WAY) for place, own in places.items()}
        os.closerange(3, OUT_OF_THE_WAY)
        for place, copy in copies.items():
            os.dup2(copy, place)
        os.closerange(OUT_OF_THE_WAY, 2 * OUT_OF_THE_WAY)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        for name in [name for name in sys.modules if name.partition(".")[0] == "ks"]:
            del sys.modules[name]  # a run imports its own, whatever the sweep has in memory
        gc.enable()
        sys.orig_argv, sys.argv, sys.path[0] = args, args[1:], os.path.dirname(os.path.abspath(args[1]))
        subprocess._fork_exec = stand_in(fork)  # type: ignore[attr-defined]
        runpy.run_path(args[1], run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):  # a broken pipe, or closed
            atexit._run_exitfuncs()
            sys.stdout.flush()
        os._exit(code)


def fork(*request) -> int:
    """Fork this process to become a script; a script starts scripts in this way."""
    pid = os.fork()
    if not pid:
        become(*request)
    return pid


def stand_in(start):
    """Return a stand-in for `subprocess._fork_exec` that starts scripts by `start`, with the arguments of `become`."""

    def fork_exec(args, executables, close_fds, keep, cwd, env, *rest) -> int:
        request = request_of(args, keep, cwd, env, rest)
        return start(*request) if request else start_cold(args, executables, close_fds, keep, cwd, env, *rest)

    return fork_exec


class Nursery:
    """A process that has the libraries and forks scripts for this one."""

    def __init__(self):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen([sys.executable, __file__, str(number)], pass_fds=[number])

    def fork(self, *request) -> int:
        """Let the nursery fork a script, as a child of this process; a test starts scripts in this way."""
        *request, places = request
        message = json.dumps([*request, [*places]]).encode()
        prctl = ctypes.CDLL(None).prctl
        prctl(SET_CHILD_SUBREAPER, 1)  # for this moment alone: other orphans go where they always go
        socket.send_fds(self.socket, [message], [*places.values()])
        pid = int(self.socket.recv(16))
        prctl(SET_CHILD_SUBREAPER, 0)
        return pid

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


def serve(requests: socket.socket) -> None:
    """Fork a script for every request; the process between ends, so that the script becomes a child of the test."""
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 2**20, 16)
        if not message:
            return
        *request, places = json.loads(message)
        read, write = os.pipe()
        between = os.fork()
        if not between:
            pid = fork(*request, dict(zip(places, descriptors)))
            os.write(write, b"%d" % pid)
            os._exit(0)
        os.waitpid(between, 0)
        requests.send(os.read(read, 16))
        for descriptor in (read, write, *descriptors):
            os.close(descriptor)


def save_blank(figure, path, **options) -> None:
    """Stand in for `Figure.savefig`: an empty picture. Drawing takes most of the time of a small sweep."""
    blank = '<svg viewBox="0 0 1 1"></svg>'
    path.write(blank) if hasattr(path, "write") else Path(path).write_text(blank)


if __name__ == "__main__":
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # the tests of a GPU may run without some of them
            importlib.import_module(library)
    if "matplotlib.figure" in sys.modules:
        sys.modules["matplotlib.figure"].Figure.savefig = save_blank
    gc.collect()
    gc.freeze()  # a fork would copy what a collection touches
    serve(socket.socket(fileno=int(sys.argv[1])))
