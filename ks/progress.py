"""Progress of a sweep on stderr: one bar on a terminal, a line per run elsewhere, nothing when quiet."""

import sys
from collections.abc import Callable

from tqdm import tqdm

from ks import cli
from ks.launch import Task


class Progress:
    """Counts epochs over all runs.

    Args:
        num_runs: trainings of the sweep.
        num_epochs: epochs of each.
        epochs_done: the number of epochs that a task has finished so far.
        quiet: show nothing.
    """

    def __init__(self, num_runs: int, num_epochs: int, epochs_done: Callable[[Task], int], quiet: bool):
        self.num_runs, self.num_epochs, self.epochs_done, self.quiet = num_runs, num_epochs, epochs_done, quiet
        self.ended, self.started = 0, set()
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            self.bar = tqdm(total=num_runs * num_epochs, unit="epoch", dynamic_ncols=True, smoothing=0.05)

    def poll(self, running: list[Task]) -> None:
        """Called again and again with the tasks that train."""
        for task in running:
            if task not in self.started:
                self.started.add(task)
                if self.bar is None:
                    cli.note(f"{task.name}: training ({len(self.started)} of {self.num_runs})", self.quiet)
        if self.bar is not None:
            self.bar.set_description(", ".join(task.name for task in running), refresh=False)
            self._show(self.ended * self.num_epochs + sum(map(self.epochs_done, running)))

    def end(self, message: str) -> None:
        """One run has ended, well or not."""
        self.ended += 1
        if self.bar is None:
            cli.note(message, self.quiet)
        else:
            self.bar.write(message, file=sys.stderr)
            self.bar.refresh()

    def _show(self, epochs: int) -> None:
        self.bar.update(epochs - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
