"""Progress of a sweep on stderr: one bar on a terminal, a line for each run elsewhere, nothing with --quiet."""

import sys
import time

from tqdm import tqdm

from ks.cli.console import note
from ks.errors import one_line
from ks.files.curves import EpochCounter
from ks.files.status import ended_well
from ks.sweep.launcher import Outcome, Task
from ks.sweep.run import Result, Run


class Progress:
    """Counts epochs over all runs.

    Args:
        runs: that are trained.
        num_epochs: epochs of each.
        quiet: show nothing.
    """

    def __init__(self, runs: list[Run], num_epochs: int, quiet: bool):
        self.num_runs, self.num_epochs, self.quiet = len(runs), num_epochs, quiet
        self.epochs_of = {run.task: EpochCounter(run.files.curves_csv) for run in runs}
        self.ended = 0
        self.started: set[Task] = set()
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            self.bar = tqdm(total=len(runs) * num_epochs, unit="epoch", dynamic_ncols=True, smoothing=0.05)

    def poll(self, running: list[Task]) -> None:
        """Show how far the running tasks are; called several times a second."""
        for task in running:
            if task not in self.started:
                self.started.add(task)
                if self.bar is None:
                    note(f"{task.name}: training ({len(self.started)} of {self.num_runs})", self.quiet)
        if self.bar is not None:
            self.bar.set_description(", ".join(task.name for task in running), refresh=False)
            epochs = self.ended * self.num_epochs + sum(self.epochs_of[task]() for task in running)
            self.bar.update(epochs - self.bar.n)

    def end(self, result: Result, outcome: Outcome) -> None:
        """Show how one run ended; after a failure, with the end of its log."""
        task, curves = result.run.task, result.curves
        loss = f", validation loss {curves[-1]['val_loss']:.6g}" if curves else ""
        message = f"{task.name}: {result.ending}{loss}, {outcome.seconds:.1f} s"
        if not ended_well(result.ending):
            message = "\n  ".join([f"{message}; end of {task.log}:", *_tail(task)])
        self.ended += 1
        if self.bar is None:
            note(message, self.quiet)
        else:
            self.bar.write(message, file=sys.stderr)
            self.bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def _tail(task: Task) -> list[str]:
    """Return the last lines of a task's log."""
    try:
        return [one_line(line) for line in task.log.read_text(errors="replace").splitlines()[-15:]]
    except OSError as error:
        return [f"({error.strerror})"]


class SlowWork:
    """Tells on stderr what a long computation is at, at most every two seconds.

    Args:
        quiet: show nothing.
    """

    SECONDS = 2.0

    def __init__(self, quiet: bool):
        self.quiet, self.last = quiet, time.monotonic()

    def __call__(self, step: str) -> None:
        """Show a step of the computation, in a few words."""
        if time.monotonic() - self.last >= self.SECONDS:
            self.last = time.monotonic()
            note(step, self.quiet)
