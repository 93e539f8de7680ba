"""The record of a run: what is written and printed when it begins, after every epoch, and at its end."""

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
from ks.model.prediction import per_token
from ks.training.best_model import BestModel
from ks.training.endings import check_finite, check_validation, ending_of
from ks.training.latency import measure_latency
from ks.training.optimizer import Optimizer
from ks.training.problem import Problem, chain_notes
from ks.training.resume_state import ResumeState
from ks.training.run_state import is_resumable, read_state, settings_of
from ks.training.schedule import Schedule
from ks.training.steps import useful_threads
from ks.training.trackers import Tracker
from ks.training.trainable_chain import TrainableChain


class Recorder:
    """The record of one run, from its start to its end.

    Args:
        config, problem: of the run.
        settings: that a resumed run must share.
        files: of the run, in a claimed folder.
        owned: the files in the folder that this run may overwrite.

    `threads` are those of the CPU at the start, the same as in the run that is resumed; steps use as many as pay.
    """

    def __init__(self, config: TrainerConfig, problem: Problem, settings: dict, files: RunFiles, owned: set[Path]):
        self.config, self.problem, self.files = config, problem, files
        self.resume_state = ResumeState(files, settings, config.resume)
        before: dict = {}
        if self.resume_state.found:
            torch.set_num_threads(self.resume_state.found.threads)
            before = read_json_object(files.training_log)
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
        if before.get("latency"):
            self.log["latency"] = before["latency"]
        self._started = time.perf_counter() - before.get("train_seconds", 0.0)
        self._next_write = 0.0
        self._best: BestModel | None = None
        self._tracker = Tracker(config, files, settings)

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
        self._best = BestModel(chain, weight, self.problem.metric, keep_start)
        self.curves = self.resume_state.restore(optimizer, schedule, self._best)
        if self.resume_state.found:
            write_curves(self.files, self.curves)
            self.log["resumed_after"] = len(self.curves)
            write_json(self.files.training_log, self.log)
            console.note(f"resumed after epoch {len(self.curves)}", self.config.quiet)

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the epochs that are left, from 1; the last one comes early with --stop_below."""
        for epoch in range(len(self.curves) + 1, self.config.num_epochs + 1):
            self._epoch_started = time.perf_counter()
            yield epoch
            if self._relative_loss(self.curves[-1]) <= (self.config.stop_below or -math.inf):
                return

    def record(
        self,
        steps: list[tuple[torch.Tensor, torch.Tensor]],
        val_loss: float,
        metrics: dict[str, float | None],
        lr: float,
    ) -> None:
        """Record a finished epoch: best model, curves on disk, terminal, tracker, resume state and checkpoint.

        Args:
            steps: loss and gradient norm of every step.
            val_loss: the criterion on the validation samples.
            metrics: their averages.
            lr: of the last step.
        Raises:
            Diverged: a loss is not finite.
        """
        losses, norms = torch.stack([torch.stack(column) for column in zip(*steps)])
        row = self._row(losses, val_loss, lr)
        if self.config.log_grad_norm or self.config.log_to:
            row["grad_norm"] = norms.mean().item()
        row |= metrics
        self.curves.append(row)
        assert self._best is not None
        self._best.offer(val_loss, row)  # first, so that an epoch on disk has a best model whenever a signal comes
        self._write_curves()
        self._print(losses * self.problem.unit_of_loss, norms, metrics)
        self._tracker.log(self.curves)
        if trouble := self._optimizer.trouble():
            self.warn("optimizer", trouble)
        check_finite(row, losses, self.problem.edits)
        self.resume_state.offer(self.threads, self.curves, self._optimizer, self._schedule, self._best)
        if self.config.save_interval and row["epoch"] % self.config.save_interval == 0:
            self._save_checkpoint(self.files.epoch_checkpoint(row["epoch"]))

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
        self.log |= problem.effects(chain.model)
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
            if self._best is not None and self._best.row:
                last.callback(self._save_best, self._best)
            last.callback(self._tracker.close)
            last.callback(self.resume_state.write_latest)

    def end(self, error: BaseException | None) -> int:
        """Record how the run ended, and print it; return the exit code.

        Raises:
            the error, if it is a fault of the program.
        """
        ending, code = ending_of(error, self.config, self.problem)
        message = one_line(ending.detail)
        self.log |= {"status": ending.status} | ({"error": message} if message else {})
        self.log |= {"ended": now(), "train_seconds": time.perf_counter() - self._started}
        self.config_file |= {"ended": self.log["ended"], **peak_memory(self.problem.device)}
        with contextlib.suppress(OSError):  # a full disk has been reported
            write_json(self.files.config, self.config_file)
            write_json(self.files.training_log, self.log)
        if error is not None and code == console.EXIT_INTERNAL:
            raise error
        if message:
            print(f"train_with_random.py: {message}", file=sys.stderr)
        else:
            print(self._outcome())
        return code

    def _row(self, losses: torch.Tensor, val_loss: float, lr: float) -> dict:
        """Return the row of the curves for an epoch, in the user's units.

        The population loss is computed ten times in a run, and after every epoch where --stop_below depends on it.
        """
        config, problem, unit, epoch = self.config, self.problem, self.problem.unit_of_loss, len(self.curves) + 1
        row = {
            "epoch": epoch,
            "train_loss": losses.mean().item() * unit,
            "val_loss": val_loss * unit,
            "rank": config.rank,
            "lr": lr,
            "epoch_seconds": time.perf_counter() - self._epoch_started,
            "segment": self.resume_state.segment,
        }
        interval = math.ceil(config.num_epochs / 10) if config.stop_below is None else 1
        if problem.edits.criterion_is_ours and (epoch % interval == 0 or epoch == config.num_epochs):
            row["population_loss"] = population_loss(self._weight, self._chain.factors, problem.metric) * unit
        return row

    def _relative_loss(self, row: dict) -> float:
        return row.get("population_loss", math.nan) / self.problem.predict_zero_loss

    def _write_curves(self) -> None:
        """Write the curves, unless writing would take more than 5% of the time."""
        started = time.monotonic()
        if started >= self._next_write:
            write_curves(self.files, self.curves)
            self._next_write = started + 20 * (time.monotonic() - started)

    def _save_checkpoint(self, path: Path) -> None:
        if path.name not in self.config_file["files"]:  # recorded before it is written
            self.config_file["files"].append(path.name)
            write_json(self.files.config, self.config_file)
        self.problem.save(self._chain.model, path)

    def _save_best(self, best: BestModel) -> None:
        if self.problem.edits.criterion_is_ours:
            best.row["population_loss"] = best.population_loss() * self.problem.unit_of_loss
        self.problem.save(best.chosen(), self.files.best)

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

    def _outcome(self) -> str:
        last = self.curves[-1]
        text = f"rank {self.config.rank}: validation loss {last['val_loss']:.6g}"
        if "population_loss" in last:
            text += f", relative loss {self._relative_loss(last):.2%}"
            if held_out := self.problem.layer_inputs.held_out_predict_zero_loss:
                text += f", {last['val_loss'] / held_out:.2%} on held-out inputs"
        if "loss_increase" in self.log:
            increase = per_token(self.log["loss_increase"], self.problem.unit)
            text += f", predicted to cost the model {increase}"
        return f"{text}; {self.files.final}"


def run_recorded(train: Callable[[TrainerConfig, Problem, Recorder], None], config: TrainerConfig, problem: Problem):
    """Claim the files of a run, train, and record how it ends.

    A diverged, interrupted or out-of-memory run and a failed write end with one line.

    Args:
        train: trains and records every epoch.
    Returns:
        the exit code.
    Raises:
        UsageError: the folder is in use, holds another run (with --resume), or a file of the user's is in the way.
    """
    files = RunFiles(prepare_output_dir(config.output_dir), config.save_prefix, config.rank)
    with locked(files.lock, "another run", wait=10), signals.deferred():
        settings = settings_of(config, problem) | {"rank": config.rank}
        inputs = config.files_read()
        own = [*files.results(), *files.epoch_checkpoints()]
        delete_leftovers(own)
        owned = recorded(files.config, own)
        resumable = config.resume and is_resumable(files, settings)
        planned = files.epoch_checkpoints() if config.save_interval else []
        check_free([*files.results(), *planned], owned, inputs, "choose another --output_dir or --save_prefix")
        if not resumable:
            delete(owned, inputs)
            owned = set()
        elif read_state(files, config.num_epochs, config.stop_below, "the run goes on").ending == OK:
            print(f"rank {config.rank}: finished before; {files.final}")
            return console.EXIT_OK
        for text in (*problem.notes, *chain_notes(problem.chain)):
            console.note(text, config.quiet)
        recorder, error = Recorder(config, problem, settings, files, owned), None
        try:
            try:
                recorder.start()
                train(config, problem, recorder)
            finally:
                recorder.close()
        except BaseException as raised:
            error = raised
        return recorder.end(error)
