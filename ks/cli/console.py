"""How a script talks to its user: exit codes, one-line errors, notes on stderr."""

import functools
import gc
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ks import signals
from ks.errors import UsageError, one_line

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_INTERNAL = 4
EXIT_INTERRUPTED = signals.EXIT_INTERRUPTED


def script(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate the main function of a script, so that every error has its exit code.

    UsageError: one line on stderr and exit code 2. Interrupt: one line and 130. Any other exception is a fault of the
    program: traceback and 4.
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
        except Exception:
            traceback.print_exc()
            print(f"{name}: internal error; please report it with the command line", file=sys.stderr)
            return EXIT_INTERNAL

    return guarded


def note(message: str, quiet: bool = False) -> None:
    """Print a remark for the user on stderr."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)
