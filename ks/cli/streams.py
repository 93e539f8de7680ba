"""Replace stdout and stderr by streams that ignore write errors, as of a closed terminal or a full disk."""

import os
import sys
from typing import Any, TextIO


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


def make_forgiving() -> None:
    """Replace sys.stdout and sys.stderr of a script.

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
