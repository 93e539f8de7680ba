"""A script in a process that was forked from another one, as a fresh interpreter would run it."""

import atexit
import contextlib
import fcntl
import importlib
import io
import os
import sys
import threading
import types
from typing import Any

LAST_DESCRIPTOR = 2**20


def run_script(command: list[str], environment: dict[str, str], places: list[int], descriptors: list[int]) -> None:
    """Run a script in a process that was just forked, as a fresh interpreter would; never returns.

    Args:
        command: an interpreter, which is this one, the script and its arguments.
        environment: of the script.
        places, descriptors: the number of each file that the script has, and its number here.
    """
    code: Any = 1
    try:
        free = max(places) + 1
        copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, free) for descriptor in descriptors]
        os.closerange(0, free)
        for copy, place in zip(copies, places, strict=True):
            os.dup2(copy, place)
        os.closerange(free, LAST_DESCRIPTOR)
        os.environ.clear()
        os.environ.update(environment)
        _, script, *_ = sys.orig_argv = command
        sys.argv = command[1:]
        del sys.path[0]  # the folder that the script before has put there
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(script)
        importlib.invalidate_caches()
        streams = [_stream(number) for number in range(3)]
        sys.stdin, sys.stdout, sys.stderr = streams
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = script
        with open(script, "rb") as source:
            code = compile(source.read(), script, "exec")
        exec(code, main.__dict__)
        code = 0
    except SystemExit as left:
        code = left.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        code = 1
        sys.stdout.flush()
        if error.__traceback__ is not None:
            error.__traceback__ = error.__traceback__.tb_next  # without the frame of this function
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads of the script
            atexit._run_exitfuncs()
            sys.stdout.flush()
        os._exit((code or 0) & 0xFF)


def _stream(number: int) -> io.TextIOWrapper:
    """Return a standard stream as a fresh interpreter opens it, like those that this process began with."""
    unbuffered = getattr(sys.stdout, "write_through", False)  # with PYTHONUNBUFFERED
    errors = "backslashreplace" if number == 2 else getattr(sys.stdin, "errors", "strict")
    file = open(number, "wb" if number else "rb", 0 if number and unbuffered else -1, closefd=False)  # noqa: SIM115
    by_line = number == 2 and not unbuffered
    return io.TextIOWrapper(file, sys.stdout.encoding, errors, line_buffering=by_line, write_through=unbuffered)
