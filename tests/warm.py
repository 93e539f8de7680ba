"""Start scripts as forks of a process that has loaded torch, because imports take most of the time of a test.

A test starts a script with `subprocess`, as a user's shell would. The fixture `nursery` of conftest.py replaces the
system call below it: a `Nursery`, which has loaded the libraries, forks the script as a sweep has its runs forked
(`ks.study.fork_server`). Outside Linux, and for any command but `python SCRIPT.py ...` in the test's own environment,
processes start as usual.
Forked scripts save empty pictures. Tests of pictures, of start-up or of command lines use the fixture `cold`.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ks.study.fork_server import forked, serve
from ks.study.forked_script import run_script

LIBRARIES = [
    *("torch", "safetensors.torch", "scipy.linalg", "pandas", "msgspec", "filelock"),
    *("matplotlib.figure", "matplotlib.ticker", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
]
start_cold = subprocess._fork_exec  # type: ignore[attr-defined]


class FileSizeLimit:
    """A preexec_fn after which no file can grow beyond a number of bytes: it stands in for a full disk."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def request_of(args, keep, cwd, env, rest):
    """Return what `become` needs for the arguments of `subprocess._fork_exec`, with descriptors by their places.

    None if the command is no script in the environment of the test.
    """
    stdin, _, _, stdout, _, stderr, _, errors, _, new_session, *_, preexec = rest[:16]
    given = dict(os.environ) if env is None else dict(os.fsdecode(entry).split("=", 1) for entry in env)
    command = [*map(os.fsdecode, args)]
    is_script = command[0] == sys.executable and command[1:] and command[1].endswith(".py")
    if not is_script or not isinstance(preexec, FileSizeLimit | None) or given != dict(os.environ):
        return None
    # -1 stands for this process's own stream
    places = {number: own if own != -1 else number for number, own in enumerate((stdin, stdout, stderr))}
    places |= {number: number for number in {*keep} - {errors}}
    return (
        command,
        given,
        [*places],
        os.fsdecode(cwd or os.getcwd()),
        bool(new_session),
        preexec and preexec.size,
        places,
    )


def become(request: bytes, descriptors: list[int]) -> None:
    """Run a script in this process, which was just forked; never returns."""
    command, environment, places, folder, new_session, largest_file = json.loads(request)
    if new_session:
        os.setsid()
    if largest_file is not None:
        FileSizeLimit(largest_file)()
        environment["GIT_DIR"] = os.devnull  # git, ended by the limit, would leave its lock in the checkout
    os.chdir(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ks"]:
        del sys.modules[name]  # the script may be that of another copy of the toolkit
    gc.enable()
    run_script(command, environment, places, descriptors)


class Nursery:
    """A process that has the libraries and forks scripts for this one."""

    def __init__(self):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen([sys.executable, __file__, str(number)], pass_fds=[number])

    def fork_exec(self, args, executables, close_fds, keep, cwd, env, *rest) -> int:
        """Stand in for `subprocess._fork_exec`: let the nursery fork a script, as a child of this process."""
        if (request := request_of(args, keep, cwd, env, rest)) is None:
            return start_cold(args, executables, close_fds, keep, cwd, env, *rest)
        *request, places = request
        return forked(self.socket, json.dumps(request).encode(), [*places.values()])

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


def save_blank(figure, path, **options) -> None:
    """Stand in for `Figure.savefig`: an empty picture. Drawing takes most of the time of a small sweep."""
    blank = '<svg viewBox="0 0 1 1"></svg>'
    if isinstance(path, io.BytesIO):
        path.write(blank.encode())
    else:
        path.write(blank) if hasattr(path, "write") else Path(path).write_text(blank)


if __name__ == "__main__":
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # the tests of a GPU may run without some of them
            importlib.import_module(library)
    if "matplotlib.figure" in sys.modules:
        sys.modules["matplotlib.figure"].Figure.savefig = save_blank
    gc.collect()
    serve(socket.socket(fileno=int(sys.argv[1])), become)
