"""A lifeline from a process to its children: a pipe that closes when the process ends, however it ends."""

import contextlib
import ctypes
import os
import signal
import sys
import threading

VARIABLE = "KS_LIFELINE"  # file descriptor and inode of the pipe, so that a value from elsewhere is recognised
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl


class Lifeline:
    """The holder's side; children are started with its `descriptor` in pass_fds and its `environment`."""

    def __init__(self):
        self.descriptor, self._held = os.pipe()
        self.environment = {VARIABLE: f"{self.descriptor}:{os.fstat(self.descriptor).st_ino}"}

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._held)


def stop_with_parent() -> None:
    """In a child that was given a lifeline: send this process SIGTERM when the holder has ended.

    On Linux this holds for a stopped child too: the end of its parent continues it.
    """
    descriptor, _, inode = os.environ.get(VARIABLE, "").partition(":")
    try:
        if os.fstat(int(descriptor)).st_ino != int(inode):
            return
    except (ValueError, OSError, OverflowError):
        return
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a libc without prctl
            ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGCONT)

    def watch():
        with contextlib.suppress(OSError):
            os.read(int(descriptor), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
