"""The record of a run: its files, decisions, curves, resume state, best model, and every way to end."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch

from ks import signals
from ks.bounds.population_loss import population_loss
from ks.cli import console
from ks.cli.flags import TrainerConfig
from ks.errors import one_line
from ks.files.atomic import delete_leftovers, prepare_output_dir, read_json_object, write_json
from ks.files.curves import write_curves
from ks.files.layout import RunFiles
from ks.files.ownership import check_free, delete, locked, recorded
from ks.files.provenance import now, peak_memory, provenance
from ks.files.status import OK, Status
from ks.training.best_model import BestModel
from ks.training.checkpoints import Checkpoints
from ks.training.endings import check_finite, check_validation, end_of
from ks.training.latency import measure_latency
from ks.training.optimizer import Optimizer
from ks.training.problem import Problem, chain_notes
from ks.training.run_state import is_resumable, read_state
from ks.training.schedule import Schedule
from ks.training.settings import settings_of
from ks.training.steps import useful_threads
from ks.training.trackers import Tracker
from ks.training.trainable_chain import TrainableChain


class Recorder:
    """The record of one run, from its start to its end.

    Args:
        config: of the run.
        problem: that it solves.
        settings: that a resumed run must share.
        files: of the run, in a claimed folder.
        owned: the files in the folder that this run may overwrite.
        resume: whether to continue an earlier run from its resume state.

    `threads` are those of the CPU at the start, the same as in the run that is resumed; steps use as many as pay.
    """

    def __init__(
        self,
        config: TrainerConfig,
        problem: Problem,
        settings: dict,
        files: RunFiles,
        owned: set[Path],
        resume: bool,
    ):
        self.config, self.problem, self.files = config, problem, files
        self.checkpoints = Checkpoints(files, settings, resume)
        found = self.checkpoints.found
        if found:
            torch.set_num_threads(found.threads)
        self.threads = torch.get_num_threads()
        self.curves: list[dict] = []
        self.config_file: dict = {
            "settings": settings,
            "arguments": vars(config),
            "problem": problem.describe(),
            "provenance": provenance(),
            "files": sorted(path.name for path in {*files.results(), *owned}),
        }
        self.log: dict = {"status": Status.RUNNING, "started": now()}
        before = read_json_object(files.training_log) if found else {}
        self._seconds_before = before.get("train_seconds", 0.0)
        if before.get("latency"):
            self.log["latency"] = before["latency"]
        self._started = time.perf_counter()
        self._next_write = 0.0
        self._best: BestModel | None = None
        self._tracker = Tracker(config, files, settings) if config.log_to else None

    def start(self) -> None:
        """Write config and log, so that a killed run leaves them."""
        write_json(self.files.config, self.config_file)
        write_json(self.files.training_log, self.log)

    def record_choice(self, what: str, name: str, reason: str, warning: str | None = None) -> None:
        """Record and print a choice of the program and its reason; a warning is shown even with --quiet."""
        self.config_file[what] = {"name": name, "reason": reason} | ({"warning": warning} if warning else {})
        write_json(self.files.config, self.config_file)
        console.note(f"{what} {name}: {reason}", self.config.quiet)
        if warning:
            console.note(f"WARNING: {warning}")

    def warn(self, what: str, warning: str) -> None:
        """Record a warning, and show it even with --quiet."""
        self.config_file.setdefault("warnings", {})[what] = warning
        write_json(self.files.config, self.config_file)
        console.note(f"WARNING: {warning}")

    def begin(self, weight: torch.Tensor, chain: TrainableChain, optimizer: Optimizer, schedule: Schedule) -> None:
        """Take what is trained; put the resume state back, after which the run goes on as if it had not stopped.

        Args:
            weight: W in internal coordinates, float64.
            chain, optimizer, schedule: at their start.
        """
        self._weight, self._chain, self._optimizer, self._schedule = weight, chain, optimizer, schedule
        torch.set_num_threads(useful_threads(self.problem.chain.parameters(self.config.rank) * self.config.batch_size))
        keep_start = self.problem.edits.criterion_is_ours and self.config.init == "hierarchical"
        self._best = BestModel(chain, weight, self.problem.moment, keep_start)
        if self.checkpoints.found:
            self.curves = self.checkpoints.restore(optimizer, schedule, self._best)
            write_curves(self.files, self.curves)
            self.log["resumed_after"] = len(self.curves)
            write_json(self.files.training_log, self.log)
            console.note(f"resumed after epoch {len(self.curves)}", self.config.quiet)

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the epochs that are left, from 1; the last one comes early with --stop_below."""
        stop_below = -math.inf if self.config.stop_below is None else self.config.stop_below
        for epoch in range(len(self.curves) + 1, self.config.num_epochs + 1):
            self._epoch_started = time.perf_counter()
            yield epoch
            if self._relative_loss(self.curves[-1]) <= stop_below:
                return

    def record(
        self,
        steps: list[tuple[torch.Tensor, torch.Tensor]],
        val_loss: float,
        metrics: dict[str, float | None],
        lr: float,
    ) -> None:
        """Record a finished epoch: curves on disk, terminal, tracker, best model and resume state.

        Args:
            steps: loss and gradient norm of every step.
            val_loss: the criterion on the validation samples.
            metrics: their averages.
            lr: of the last step.
        Raises:
            Diverged: a loss is not finite.
        """
        config, problem, unit = self.config, self.problem, self.problem.unit_of_loss
        losses, norms = torch.stack([torch.stack(column) for column in zip(*steps)])
        epoch = len(self.curves) + 1
        row = {
            "epoch": epoch,
            "train_loss": losses.mean().item() * unit,
            "val_loss": val_loss * unit,
            "rank": config.rank,
            "lr": lr,
            "epoch_seconds": time.perf_counter() - self._epoch_started,
            "segment": self.checkpoints.segment,
        }
        interval = math.ceil(config.num_epochs / 10) if config.stop_below is None else 1
        if problem.edits.criterion_is_ours and (epoch % interval == 0 or epoch == config.num_epochs):
            row["population_loss"] = population_loss(self._weight, self._chain.factors, problem.moment) * unit
        if config.log_grad_norm or config.log_to:
            row["grad_norm"] = norms.mean().item()
        row |= metrics
        self.curves.append(row)
        assert self._best is not None
        self._best.offer(val_loss, row)  # first, so that an epoch on disk has a best model whenever a signal comes
        self._write_curves()
        self._print(losses * unit, norms, metrics)
        if self._tracker:
            self._tracker.log(self.curves)
        if trouble := self._optimizer.trouble():
            self.warn("optimizer", trouble)
        check_finite(row, losses, problem.edits)
        self.checkpoints.offer(self.threads, self.curves, self._optimizer, self._schedule, self._best)
        if config.save_interval and epoch % config.save_interval == 0:
            self._own(self.files.epoch_checkpoint(epoch))
            problem.save(self._chain.model, self.files.epoch_checkpoint(epoch))

    def finish(self) -> None:
        """Save the trained chain, check its losses against each other, and measure its latency.

        Raises:
            InternalError: the final validation loss contradicts the population loss.
        """
        config, problem, chain = self.config, self.problem, self._chain
        self.log["epochs"] = len(self.curves)
        if math.isfinite(relative_loss := self._relative_loss(self.curves[-1])):
            self.log["relative_loss"] = relative_loss
        problem.save(chain.model, self.files.final)
        if problem.edits.criterion_is_ours:
            val_loss = self.curves[-1]["val_loss"] / problem.unit_of_loss
            tf32 = config.float32_precision == "tf32"
            check_validation(val_loss, self._weight, chain.model, problem, chain.dtype, tf32)
        if config.latency_seconds and "latency" not in self.log:
            began = time.perf_counter()
            place = (chain.dtype, config.impl, self.threads, config.latency_seconds)
            self.log["latency"] = msgspec.structs.asdict(measure_latency(chain.model, self._weight, *place))
            self._started += time.perf_counter() - began

    def close(self) -> None:
        """Write what the finished epochs leave, however the run ended; a file that fails costs no other one."""
        with contextlib.ExitStack() as last:  # runs all of these, the lowest first, though one raises
            if self.curves:
                last.callback(write_curves, self.files, self.curves)
            if self._best is not None and self._best.row is not None:
                last.callback(self._save_best, self._best, self._best.row)
            if self._tracker:
                last.callback(self._tracker.close)
            last.callback(self.checkpoints.write_latest)

    def _save_best(self, best: BestModel, row: dict) -> None:
        if self.problem.edits.criterion_is_ours:
            row["population_loss"] = best.population_loss() * self.problem.unit_of_loss
        self.problem.save(best.chosen(), self.files.best)

    def end(self, error: BaseException | None) -> int:
        """Record how the run ended, and print it; return the exit code.

        Raises:
            the error, if it is a fault of the program.
        """
        end = end_of(error, self.config, self.problem.device, self.files)
        self.log["status"] = end.status
        if end.message is not None:
            self.log["error"] = one_line(end.message)
        seconds = self._seconds_before + time.perf_counter() - self._started
        self.log |= {"ended": now(), "train_seconds": seconds}
        self.config_file |= {"ended": self.log["ended"], **peak_memory(self.problem.device)}
        with contextlib.suppress(OSError):  # a full disk has been reported
            write_json(self.files.config, self.config_file)
            write_json(self.files.training_log, self.log)
        if error is not None and end.is_fault:
            raise error
        if end.message is not None:
            print(f"train_with_random.py: {one_line(end.message)}", file=sys.stderr)
        else:
            print(self._outcome())
        return end.exit_code

    def _relative_loss(self, row: dict) -> float:
        return row.get("population_loss", math.nan) / self.problem.predict_zero_loss

    def _outcome(self) -> str:
        last = self.curves[-1]
        text = f"rank {self.config.rank}: validation loss {last['val_loss']:.6g}"
        if "population_loss" in last:
            text += f", relative loss {self._relative_loss(last):.2%}"
            if held_out := self.problem.layer_inputs.held_out_predict_zero_loss:
                text += f", {last['val_loss'] / held_out:.2%} on held-out inputs"
        return f"{text}; {self.files.final}"

    def _own(self, path: Path) -> None:
        """Record a file before it is written."""
        if path.name not in self.config_file["files"]:
            self.config_file["files"].append(path.name)
            write_json(self.files.config, self.config_file)

    def _write_curves(self) -> None:
        """Write the curves, unless writing would take more than 5% of the time."""
        started = time.monotonic()
        if started >= self._next_write:
            write_curves(self.files, self.curves)
            self._next_write = started + 20 * (time.monotonic() - started)

    def _print(self, losses: torch.Tensor, norms: torch.Tensor, metrics: dict[str, float | None]) -> None:
        """Print a line for the epoch; with --verbose, also lines within it."""
        config, row = self.config, self.curves[-1]
        if config.verbose:
            for step in range(config.log_interval - 1, len(losses), config.log_interval):
                norm = f", gradient norm {norms[step]:.4g}" if config.log_grad_norm else ""
                console.note(f"  step {step + 1}/{len(losses)}: loss {losses[step]:.6g}{norm}", config.quiet)
        shown = {"gradient norm": row.get("grad_norm"), **metrics}
        extra = "".join(f", {name} {value:.4g}" for name, value in shown.items() if value is not None)
        console.note(
            f"epoch {row['epoch']}/{config.num_epochs}: train {row['train_loss']:.6g}, "
            f"validation {row['val_loss']:.6g}{extra}, {row['epoch_seconds']:.2f} s",
            config.quiet,
        )


def run_recorded(train: Callable[[TrainerConfig, Problem, Recorder], None], config: TrainerConfig, problem: Problem):
    """Claim the files of a run, train, and record how it ends.

    A diverged, interrupted or out-of-memory run and a failed write are over with one line.

    Args:
        train: trains and records every epoch.
        config: of the run.
        problem: that it solves.
    Returns:
        the exit code.
    Raises:
        UsageError: the folder is in use, holds another run (with --resume), or a file of the user's is in the way.
    """
    files = RunFiles(prepare_output_dir(config.output_dir), config.save_prefix, config.rank)
    with locked(files.lock, "another run", wait=10), signals.deferred():
        settings = settings_of(config, problem) | {"rank": config.rank}
        inputs = config.files_read()
        delete_leftovers([*files.results(), *files.epoch_checkpoints()])
        owned = recorded(files.config, [*files.results(), *files.epoch_checkpoints()])
        resumable = config.resume and is_resumable(files, settings)
        planned = files.epoch_checkpoints() if config.save_interval else []
        check_free([*files.results(), *planned], owned, inputs, "choose another --output_dir or --save_prefix")
        if not resumable:
            delete(owned, inputs)
        elif read_state(files, config.num_epochs, config.stop_below, "the run goes on").ending == OK:
            print(f"rank {config.rank}: finished before; {files.final}")
            return console.EXIT_OK
        for text in (*problem.notes, *chain_notes(problem.chain)):
            console.note(text, config.quiet)
        recorder = Recorder(config, problem, settings, files, owned if resumable else set(), config.resume)
        error: BaseException | None = None
        try:
            try:
                recorder.start()
                train(config, problem, recorder)
            finally:
                recorder.close()
        except BaseException as raised:
            error = raised
        return recorder.end(error)
