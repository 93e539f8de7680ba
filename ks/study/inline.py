"""The launcher of `--launcher inline`: runs in the process of the sweep, one after the other, for a debugger."""

import bdb
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Self

import torch

from ks import signals
from ks.cli.console import EXIT_INTERNAL, EXIT_USAGE
from ks.errors import UsageError, one_line
from ks.study.task import Exit, Task


class InlineLauncher:
    """Calls the main function of a task's script here, so that `breakpoint()` in the script stops at the terminal.

    The output of a run stays on the terminal; its log says so.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        pass

    def run(self, tasks: Iterable[Task], poll: Callable[[list[Task]], None]) -> Iterator[tuple[Task, Exit]]:
        """Run tasks; see `ks.study.task.Launcher.run`."""
        threads = torch.get_num_threads()
        for task in tasks:
            poll([task])
            started = time.monotonic()
            code, error = _call(task)
            torch.set_num_threads(threads)  # a run takes as many as pay
            yield task, Exit(code, time.monotonic() - started, error=error)
            if signals.came():
                raise KeyboardInterrupt


def _call(task: Task) -> tuple[int, str]:
    """Return the exit code of a task, and why it could not start."""
    _, script, *arguments = task.command
    try:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        task.log.write_text("This run printed to the terminal of its sweep (--launcher inline).\n")
        main = runpy.run_path(script)["main"]
        main = getattr(main, "__wrapped__", main)  # without the end of signals and the exit that a process has
    except OSError as error:
        return 1, f"it could not start: {error}"
    try:
        return main(arguments), ""
    except Exception as error:  # of one run; it leaves the others
        if bdb.BdbQuit in (type(error), type(error.__cause__)):
            raise KeyboardInterrupt from error  # leaving the debugger ends the sweep
        if isinstance(error, UsageError):
            print(one_line(error), file=sys.stderr)
            return EXIT_USAGE, ""
        traceback.print_exc()
        return EXIT_INTERNAL, ""
