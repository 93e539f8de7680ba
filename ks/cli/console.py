"""How a script begins, ends and talks to its user: signals and streams, exit codes, one-line errors, notes on stderr.

It loads no library, so that a script handles signals before torch is imported.
"""

import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ks import signals
from ks.errors import UsageError, one_line
from ks.files.limits import respect_cpu_quota

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_INTERNAL = 4
EXIT_INTERRUPTED = signals.EXIT_INTERRUPTED


def begin(script: str, task: str = "") -> None:
    """Handle signals and failing standard streams from now on; called `if __name__ == "__main__"`.

    Imports leave no garbage: looking for it while they run would take a third of the time of starting. It is looked for
    again when the main function begins (`script`).

    Threads that wait for the next product sleep instead of spinning: on cores shared with another process, spinning
    made an epoch 6 times longer and the floors of the demo 20 times. There are no more of them than a CPU quota allows.
    OpenMP reads both when torch loads.

    NumPy's own threads have no work here; a process with threads cannot be forked (`ks.study.fork_server`).

    MPLBACKEND counts for `--show` alone: matplotlib does not load with a wrong one, and files need none.

    Args:
        script: path of the script.
        task: what the script does, for a person who waits at a terminal while libraries load.
    """
    signals.install(script)
    _replace_streams()
    if task and sys.stderr.isatty() and not {"--quiet", "--help", "--help_all", "-h"} & {*sys.argv}:
        print(f"{os.path.basename(script)}: {task}", file=sys.stderr, flush=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    respect_cpu_quota()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if "--show" not in sys.argv:
        os.environ.pop("MPLBACKEND", None)
    gc.disable()


def script(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate the main function of a script, so that every error has its exit code.

    UsageError: one line on stderr and exit code 2. Interrupt: one line and 130. OSError, as on a full disk: one line
    and 1. Any other exception is a fault of the program: traceback and 4.
    """
    name = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def guarded(argv=None) -> int:
        signals.begin()
        gc.freeze()  # objects of imports are never garbage, also not at the exit
        gc.enable()
        try:
            try:
                return main(argv)
            finally:
                signals.end()
        except UsageError as error:
            print(f"{name}: error: {one_line(error)}", file=sys.stderr)
            return EXIT_USAGE
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            message = one_line(f"{error.strerror or error}{place}; fix the cause, then rerun the same command")
            print(f"{name}: {message}", file=sys.stderr)
            return EXIT_FAILED
        except Exception:
            traceback.print_exc()
            print(f"{name}: internal error; please report it with the command line", file=sys.stderr)
            return EXIT_INTERNAL

    return guarded


def note(message: str, quiet: bool = False) -> None:
    """Print a remark for the user on stderr."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


class _Forgiving:
    """A text stream that goes to the null device after the first write that fails."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())  # takes what is still in the buffer
        os.close(null)


def _replace_streams() -> None:
    """Replace sys.stdout and sys.stderr by streams that ignore write errors, as of a closed terminal or a full disk.

    A stream that was closed before the start is opened on the null device, so that no other file gets its number.
    Characters that the encoding lacks are written as escapes.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or os.fdopen(number, "w", closefd=False)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Forgiving(stream))
