"""Signals: INT, TERM, HUP, QUIT, XCPU and USR1 interrupt a script once, from its first import to its last file.

The first signal raises KeyboardInterrupt; while `deferred` holds, at the next `check` or at its end. All further
signals are ignored, so that nothing disturbs the saving of results. Scripts call `install`; without it, as in a
notebook or a test, nothing here changes a handler.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Windows has the first two alone; USR1 is the notice of a scheduler before it ends a job.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1")
STOPPING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
EXIT_INTERRUPTED = 130


class _State:
    """Where this process stands."""

    handled: tuple[signal.Signals, ...] = ()
    running = False  # inside the main function, which turns a KeyboardInterrupt into an exit code
    depth = 0  # of nested `deferred`
    came = False
    raised = False


def install(script: str) -> None:
    """Handle signals from now on; one that comes before `begin` ends the process with one line.

    A SIGHUP that is ignored stays so (`nohup`), but not a SIGINT: a shell's `&` has it ignored.

    Args:
        script: path of the script, for the line.
    """
    line = f"{Path(script).name}: interrupted\n".encode()

    def handle(number, frame):
        if not _State.running:
            os.write(2, line)
            os._exit(EXIT_INTERRUPTED)
        _State.came = True
        if not _State.depth:
            check()

    _State.running = _State.came = _State.raised = False  # a fork has them from the process that it comes from
    _State.depth = 0
    _State.handled = tuple(
        number
        for number in STOPPING
        if not (number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN)  # under nohup
    )
    for number in _State.handled:
        signal.signal(number, handle)


def begin() -> None:
    """Turn signals into KeyboardInterrupt from now on."""
    _State.running = True


def end() -> None:
    """Ignore every further signal: the exit code is settled."""
    for number in _State.handled:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold back the KeyboardInterrupt, so that work which belongs together is not torn apart."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    if not _State.depth:
        check()


def check() -> None:
    """Raise KeyboardInterrupt if a signal came and has not raised one yet."""
    if _State.came and not _State.raised:
        _State.raised = True
        raise KeyboardInterrupt


def came() -> bool:
    """Return whether a signal came; compiled code may turn the KeyboardInterrupt into another exception."""
    return _State.came
