"""How a script talks to its user: exit codes, one-line errors, notes on stderr, signals."""

import functools
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from ks.errors import UsageError, one_line

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_INTERNAL = 4
EXIT_INTERRUPTED = 130


def script(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate the main function of a script, so that every error has its exit code.

    UsageError: one line on stderr and exit code 2. Interrupt: one line and 130. Any other exception is a fault of the
    program: traceback and 4.
    """
    name = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def guarded(argv=None) -> int:
        try:
            return main(argv)
        except UsageError as error:
            print(f"{name}: error: {one_line(error)}", file=sys.stderr)
            return EXIT_USAGE
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception:
            traceback.print_exc()
            print(f"{name}: internal error; please report it with the command line", file=sys.stderr)
            return EXIT_INTERNAL

    return guarded


def note(message: str, quiet: bool = False) -> None:
    """Print a remark for the user on stderr."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def interrupt_on_signals() -> threading.Event:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM, also if a shell's `&` has set SIGINT to be ignored.

    Returns:
        an event that is set by the first signal: compiled code may turn the KeyboardInterrupt into another exception.
    """
    interrupted = threading.Event()

    def interrupt(signum, frame):
        interrupted.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    return interrupted
