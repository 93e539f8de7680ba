"""Progress of a sweep on stderr: one bar on a terminal, a line per run elsewhere, nothing when quiet."""

import sys
from collections.abc import Callable

from tqdm import tqdm

from ks import cli


class Progress:
    """Counts epochs over all runs.

    Args:
        num_runs: trainings of the sweep.
        num_epochs: epochs of each.
        epochs_done: the number of epochs that the run of a name has finished so far.
        quiet: show nothing.
    """

    def __init__(self, num_runs: int, num_epochs: int, epochs_done: Callable[[str], int], quiet: bool):
        self.num_runs, self.num_epochs, self.epochs_done, self.quiet = num_runs, num_epochs, epochs_done, quiet
        self.finished, self.current = 0, None
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            self.bar = tqdm(total=num_runs * num_epochs, unit="epoch", dynamic_ncols=True, smoothing=0.05)

    def poll(self, name: str) -> None:
        """Called again and again while the run of this name trains."""
        position = f"{self.finished + 1} of {self.num_runs}"
        if name != self.current:
            self.current = name
            if self.bar is None:
                cli.note(f"{name}: training ({position})", self.quiet)
            else:
                self.bar.set_description(f"{name} ({position})", refresh=False)
        if self.bar is not None:
            self._show(self.finished * self.num_epochs + self.epochs_done(name))

    def end(self, message: str) -> None:
        """One run has ended, well or not."""
        self.finished += 1
        if self.bar is None:
            cli.note(message, self.quiet)
        else:
            self.bar.write(message, file=sys.stderr)
            self._show(self.finished * self.num_epochs)

    def _show(self, epochs: int) -> None:
        self.bar.update(epochs - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
