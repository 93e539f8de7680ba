"""All runs of a study: those that ended well before are kept, the others run, with their progress on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from tqdm import tqdm

from ks import signals
from ks.cli.console import note
from ks.cli.flags import SweepConfig
from ks.errors import UsageError, one_line
from ks.files.curves import CurvesTail
from ks.files.schema import TrainingLog, read_json_as
from ks.files.status import ended_well
from ks.moments.metric import LossMetric
from ks.study.processes import Exit, Launcher, Task
from ks.study.runs import Result, Run

CLOCK_SECONDS = 1.0  # a file system's time may lag behind the clock's
BAR = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} epochs, {remaining} left{postfix}"

ReadResult = Callable[[Run, Exit | None], Result]


def finished_before(config: SweepConfig, runs: list[Run], read_result: ReadResult) -> dict[Run, Result]:
    """Return the results of the runs that ended well before, and delete the logs of those that start anew."""
    results: dict[Run, Result] = {}
    for run in runs:
        if signals.came():
            break
        result = read_result(run, None)
        if ended_well(result.ending):
            results[run] = result
            note(f"{run.task.name}: finished before", config.quiet)
        elif not run.files.resume.exists():
            run.files.log.unlink(missing_ok=True)
    return results


def run_all(
    config: SweepConfig,
    runs: list[Run],
    launcher: Launcher,
    read_result: ReadResult,
    results: dict[Run, Result],
    meanwhile: Iterator[None],
    floors: Mapping[int, float] = {},
) -> None:
    """Run those that are left in their order, also when others fail.

    Args:
        read_result: returns the result of a run whose process has ended.
        results: gets the result of each run that ends; after an interrupt, some are missing.
        meanwhile: work of the sweep itself while runs train, in steps of less than a second. What fails there stops no
            run: the sweep does the same work again when all runs have ended, and fails then.
        floors: the best known loss of each rank, in the unit of the curves; `meanwhile` may add to it.
    """
    run_of = {run.task: run for run in runs}
    progress = Progress(config, runs, floors)

    def poll(running: list[Task]) -> None:
        signals.check()
        progress.poll(running)
        with contextlib.suppress(Exception):
            next(meanwhile, None)

    try:
        for task, exit in launcher.run(list(run_of), poll):
            result = results[run_of[task]] = read_result(run_of[task], exit)
            progress.end(result, exit)
    except KeyboardInterrupt:
        progress.say("stopping: finished epochs are kept, and the same command resumes")
    finally:
        progress.close()


class Progress:
    """One bar over the epochs of all runs on a terminal, a line for each run elsewhere, nothing if quiet.

    `floors` are the best known losses of the ranks, in the unit of the curves.
    """

    def __init__(self, config: SweepConfig, runs: list[Run], floors: Mapping[int, float] = {}):
        self.num_epochs, self.quiet, self.floors = config.num_epochs, config.quiet, floors
        self.of_model = config.loss_metric == LossMetric.MODEL_LOSS
        self.run_of = {run.task: run for run in runs}
        self.tails = {run.task: CurvesTail(run.files.curves_csv) for run in runs}
        self.ended = 0
        self.started: set[Task] = set()
        self.resuming: dict[Task, float] = {}
        self.bar = None
        if sys.stderr.isatty() and not self.quiet:
            total = len(runs) * self.num_epochs
            self.bar = tqdm(total=total, bar_format=BAR, dynamic_ncols=True, smoothing=0.05)

    def say(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is None:
            note(message, self.quiet)
        else:
            self.bar.write(message, file=sys.stderr)
            self.bar.refresh()

    def poll(self, running: list[Task]) -> None:
        """Show how far the running tasks are; called several times a second."""
        for task in running:
            self.tails[task].update()
            if task not in self.started:
                self._start(task)
            self._print_resumed(task)
        if self.bar is not None:
            self.bar.set_postfix_str("; ".join(map(self._state, running)), refresh=False)
            epochs = self.ended * self.num_epochs + sum(self.tails[task].epochs for task in running)
            self.bar.update(epochs - self.bar.n)

    def _start(self, task: Task) -> None:
        self.started.add(task)
        if self.run_of[task].files.resume.exists():
            self.resuming[task] = time.time()
        if self.bar is None:
            self.say(f"{task.name}: training ({len(self.started)} of {len(self.run_of)})")
        else:  # epochs of an earlier sweep say nothing about the time that is left
            for count in ("initial", "n", "last_print_n"):
                setattr(self.bar, count, getattr(self.bar, count) + self.tails[task].epochs)

    def _print_resumed(self, task: Task) -> None:
        """Print where a task resumes, as soon as its log has it."""
        path = self.run_of[task].files.training_log
        try:
            if task not in self.resuming or path.stat().st_mtime < self.resuming[task] - CLOCK_SECONDS:
                return
            after = read_json_as(path, TrainingLog).resumed_after
        except (OSError, UsageError):  # the run replaces it right now
            return
        if after is not None:
            del self.resuming[task]
            self.say(f"{task.name}: resumes after epoch {after}")

    def _state(self, task: Task) -> str:
        """Return the epochs of a task, its loss, and its gap to the best known chain if that is known."""
        tail, floor = self.tails[task], self.floors.get(self.run_of[task].rank, 0.0)
        text = f"{task.name}: {tail.epochs}/{self.num_epochs}"
        if tail.val_loss is not None:
            text += f", loss {tail.val_loss:.4g}"
        if tail.population_loss is not None and floor > 0:
            text += f", gap {tail.population_loss / floor - 1:.2%}"
        return text

    def end(self, result: Result, exit: Exit) -> None:
        """Show how one run ended; after a failure, with the end of its log."""
        task, curves, log = result.run.task, result.curves, result.log
        self._print_resumed(task)
        loss = f", validation loss {curves[-1]['val_loss']:.6g}" if curves else ""
        if self.of_model and log.energy_loss is not None:
            loss = f", energy loss {log.energy_loss:.2%}"
        elif log.relative_loss is not None:
            loss = f", relative loss {log.relative_loss:.2%}"
        if log.loss_increase is not None:
            loss += f", loss increase {log.loss_increase:.3g}"
        message = f"{task.name}: {result.ending}{loss}, {exit.seconds:.1f} s"
        if not ended_well(result.ending):
            message = "\n  ".join([f"{message}; end of {task.log}:", *_tail(task)])
        self.ended += 1
        self.say(message)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def _tail(task: Task) -> list[str]:
    """Return the last lines of a task's log."""
    try:
        return [one_line(line) for line in task.log.read_text("utf-8", errors="replace").splitlines()[-15:]]
    except OSError as error:
        return [f"({error.strerror})"]
