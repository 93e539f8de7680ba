"""Start scripts in processes of their own that need not import torch: a fork of a process that has the libraries.

A test starts a script with `subprocess`, as a user's shell would. Most of its time would be imports, so `start_warm`
has such processes forked by a nursery that has loaded the libraries and nothing of this project. A script that starts
scripts itself, as a sweep does, forks them likewise. Only Linux can hand a grandchild to the process that asked for it;
elsewhere, and for whatever is more than `python SCRIPT.py ...` in the test's own environment, processes start as usual.
Scripts that are forked save empty pictures; tests that look at pictures, at the start of a process or at its command
line use the fixture `cold`.
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


def request_of(args, keep, cwd, env, stdin, stdout, stderr, errors, new_session, preexec):
    """Return what `become` needs to stand in for a command, or None where the command needs a process of its own kind.

    Args:
        args, keep, cwd, env, errors, new_session, preexec: as in `subprocess._fork_exec`, errors its errpipe_write.
        stdin, stdout, stderr: descriptors for the standard streams, -1 where they are this process's own.
    """
    given = dict(os.environ) if env is None else dict(os.fsdecode(entry).split("=", 1) for entry in env)
    changed = {name for name in {*given} | {*os.environ} if given.get(name) != os.environ.get(name)}
    command = [*map(os.fsdecode, args)]
    is_script = command[0] == sys.executable and command[1:] and command[1].endswith(".py")
    if not is_script or not isinstance(preexec, FileSizeLimit | None):
        return None
    if not changed <= SET_BY_A_SWEEP or given.get("OMP_NUM_THREADS") != "1":
        return None
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
            del sys.modules[name]  # what a sweep has in memory is nothing to its runs
        gc.enable()
        sys.argv, sys.path[0] = args[1:], os.path.dirname(os.path.abspath(args[1]))
        subprocess._fork_exec = fork_here  # type: ignore[attr-defined]
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


def fork_here(args, executables, close_fds, keep, cwd, env, *rest) -> int:
    """Stand in for `subprocess._fork_exec` in a script: the scripts that it starts are forks of itself."""
    stdin, _, _, stdout, _, stderr, _, errors, _, new_session, *_, preexec = rest[:16]
    request = request_of(args, keep, cwd, env, stdin, stdout, stderr, errors, new_session, preexec)
    if not request:
        return start_cold(args, executables, close_fds, keep, cwd, env, *rest)
    pid = os.fork()
    if not pid:
        become(*request)
    return pid


class Nursery:
    """A process that has the libraries and forks scripts for this one."""

    def __init__(self):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen([sys.executable, __file__, str(number)], pass_fds=[number])

    def fork_exec(self, args, executables, close_fds, keep, cwd, env, *rest) -> int:
        """Stand in for `subprocess._fork_exec` in a test: the nursery forks scripts, as children of this process."""
        stdin, _, _, stdout, _, stderr, _, errors, _, new_session, *_, preexec = rest[:16]
        request = request_of(args, keep, cwd, env, stdin, stdout, stderr, errors, new_session, preexec)
        if not request:
            return start_cold(args, executables, close_fds, keep, cwd, env, *rest)
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
    """Fork a script for every request; the process between ends, so that whoever asked becomes the parent."""
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 2**20, 16)
        if not message:
            return
        *request, places = json.loads(message)
        read, write = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if not pid:
                become(*request, dict(zip(places, descriptors)))
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
