"""A study of one weight: the plan of a chain family, one training for each rank, summary and figures."""

import contextlib
import dataclasses
import functools
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

from ks.bounds.floors import Floor, floor_curve
from ks.bounds.plan import make_plan
from ks.bounds.plan_notes import plan_notes
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.cli.parser import to_arguments
from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import delete_leftovers, write_csv
from ks.files.layout import SweepFiles
from ks.files.lock import locked
from ks.files.provenance import provenance
from ks.files.status import Status, ended_well
from ks.files.weights import packed
from ks.moments.read import packed_inputs
from ks.report.answer import answer
from ks.report.plan_table import plan_table
from ks.report.summary import floor_rows
from ks.report.verdict import advice, check_above_floor
from ks.study.choices import ranks_of, remedies_of, stop_losses
from ks.study.claim import claim_folder
from ks.study.copies import copies_of, copy_results
from ks.study.launcher import Launcher, Outcome
from ks.study.launching import launcher_of
from ks.study.progress import SlowWork
from ks.study.rejoin import study_in
from ks.study.run import Result, Run, result_of, runs_of, seeds_of
from ks.study.trainings import finished_before, train_all
from ks.training.checkpoints import changes, settings_in, settings_of
from ks.training.edits import TOOLKIT, Edits, edits_of
from ks.training.problem import Problem, resolve
from ks.training.samples_file import samples_in_files


class WeightStudy:
    """The ranks of one chain family on one weight.

    Args:
        config: of the sweep.
        trainer: absolute path of the training script.
        floors: of every rank that is trained, if they were computed before.
    Raises:
        UsageError: a weight, inputs or ranks that cannot be studied.
    """

    def __init__(self, config: SweepConfig, trainer: Path, floors: dict[int, Floor | None] | None = None):
        self.config, self.trainer = config, trainer
        self.problem = problem = resolve(config, edits_of(trainer))
        _check_edits(config, trainer, problem.edits)
        ours = problem.edits.criterion_is_ours
        if not ours and (flag := _flag_that_needs_floors(config)):
            raise UsageError(
                f"{flag} needs the criterion mean_squared_error, and that of {trainer.name} is "
                f"{problem.edits.criterion}; leave it out"
            )
        if ours and (problem.rows * problem.cols > 2**22 or config.inputs):
            console.note(f"computing the floors of {problem.rows} × {problem.cols}", config.quiet)
        self.plan = make_plan(
            problem.internal_weight(),
            problem.chain,
            problem.moment,
            tight=config.tight_bounds,
            progress=SlowWork(config.quiet),
            reason=None if ours else "floors hold for mean_squared_error alone",
        )
        if config.inputs and self.plan.bounds is not None:
            isotropic = floor_curve(problem.isotropic_weight(), problem.chain)
            self.plan = dataclasses.replace(self.plan, isotropic_curve=isotropic)
        study = study_in(config)
        if study is not None and changes(settings_in(study.settings, study.loss), _identity(config, problem)):
            study = None  # another study, which claiming the folder refuses
        self.chosen, self.ranks = ranks_of(config, self.plan, study)
        if floors is None or not ours:
            floors = dict(zip(self.ranks, self.plan.floors(self.ranks), strict=True))
        self.floors = floors
        stop_below = stop_losses(config, self.floors)
        self.runs = runs_of(config, self.ranks, Path(config.output_dir).absolute(), trainer, stop_below)
        self.record = record_of(config, problem, self.ranks)
        self.rows_of_runs: list[dict] = []
        self.rows: list[dict] = []

    def plan_text(self) -> str:
        """Return the plan, for --dry_run; with --verbose, the commands of the trainings too."""
        for text in self.problem.notes:
            console.note(text, self.config.quiet)
        table = plan_table(self.plan, self.floors, self.config.verbose)
        lines = [self.record["title"], *self.remarks(), "", table, ""]
        if not self.config.verbose:
            return "\n".join([*lines, "Nothing was trained or written; --verbose shows patterns and commands."])
        return "\n".join([*lines, *(shlex.join(run.task.command) for run in self.runs if run.rank in self.chosen)])

    def remarks(self) -> list[str]:
        return plan_notes(self.plan, self.config.target_relative_loss)

    def launcher(self) -> Launcher:
        """Return the launcher that the flags name, with the files that trainings elsewhere read."""
        config, files = self.config, {}
        if config.launcher == "ray":
            weight_path = Path(config.weight_path).absolute()
            files[str(weight_path)] = (f"{weight_path.stem}.pth", packed([self.problem.weight], config.transpose))
            if config.inputs:
                inputs = Path(config.inputs).absolute()
                content = packed_inputs(inputs, config.inputs_key or self.problem.weight.key)
                files[str(inputs)] = (f"inputs_{inputs.name}", content)
        return launcher_of(config, self.problem.device, len(self.chosen) * len(seeds_of(config)), self.trainer, files)

    def locked(self, files: SweepFiles) -> contextlib.AbstractContextManager[None]:
        """Return a context in which no other sweep works in the results folder."""
        return locked(files.lock, "another sweep")

    def claim(self, files: SweepFiles) -> None:
        """Claim the results folder, and write the floors of every rank into it.

        Raises:
            UsageError: the folder holds another study.
        """
        config = self.config
        delete_leftovers(files.all(seeds_of(config)))
        claim_folder(files, self.runs, self.record, config.files_read(), config.overwrite, remedies_of(config))
        rows = floor_rows(self.plan, self.problem.predict_zero_loss)
        write_csv(files.floor_csv, columns.names(columns.FLOOR), rows)

    def train(self, launcher: Launcher) -> dict[Run, Result]:
        """Train the chosen runs that are not finished, the largest rank first; return the results that are known."""
        for text in (*self.problem.notes, *self.remarks()):
            console.note(text, self.config.quiet)
        chosen = [run for run in self.runs if run.rank in self.chosen]
        ended = {run: self.read_result(run) for run in self.runs if run.rank not in self.chosen}
        ended |= finished_before(self.config, chosen, self.read_result)
        copies = self._copies(ended)
        waiting = [run for run in chosen if run not in ended and run not in copies]
        waiting.sort(key=lambda run: (-run.rank, run.seed))
        with samples_in_files(self.config, self.problem, self._samples_of(waiting)):
            ended |= train_all(self.config, waiting, launcher, self.read_result, _load_report, self._best_known())
        for run, source in copies.items():
            if source in ended and ended_well(ended[source].ending):
                copy_results(source.files, run.files)
                ended[run] = self.read_result(run)
        return ended

    def _best_known(self) -> dict[int, float]:
        """Return the best known loss of each rank with a floor, in the unit of the curves."""
        unit = self.problem.predict_zero_loss
        return {rank: floor.upper * unit for rank, floor in self.floors.items() if floor is not None}

    def _copies(self, ended: dict[Run, Result]) -> dict[Run, Run]:
        """Return the runs above saturation that get a copy, each with its source; finished ones need none."""
        saturation = self.problem.chain.saturation_rank
        saturated = [run for run in self.runs if run.rank >= saturation]
        copies = copies_of(saturated, saturation, {run: ended.get(run) or self.read_result(run) for run in saturated})
        copies = {run: source for run, source in copies.items() if run not in ended}
        for run, source in copies.items():
            text = f"{run.task.name}: will be a copy of rank {source.rank}, because rank {saturation} is saturated"
            console.note(text, self.config.quiet)
        return copies

    def read_result(self, run: Run, outcome: Outcome | None = None) -> Result:
        """Return the result of a run; one that was trained on another weight or other inputs has failed."""
        return result_of(run, self.config.num_epochs, outcome, self.record["settings"])

    def conclude(self, files: SweepFiles, ended: dict[Run, Result]) -> list[str]:
        """Write summary and figures; return the lines to print."""
        from ks.report.summary_table import summary_table
        from ks.report.text_table import filled
        from ks.study.outputs import summarise, write_outputs

        results = [ended.get(run) or self.read_result(run) for run in self.runs]
        self.rows_of_runs, self.rows = summarise(
            results,
            self.floors,
            self.problem,
            self.plan,
            target=self.config.target_relative_loss,
            weight=Path(self.config.weight_path).name,
        )
        self.record["answer"] = answer(self.rows, self.plan, self.config.target_relative_loss)
        self.record["advice"] = advice(self.rows, self.problem.sampling)
        written = write_outputs(self.config, files, self.record, results, self.rows_of_runs, self.rows)
        return [
            *filled(self.record["answer"]),
            "",
            summary_table(self.rows, self.config.verbose),
            *filled(self.record["advice"]),
            *map(str, written),
        ]

    def statuses(self) -> set[Status]:
        """Return how the chosen runs ended, once the study is concluded."""
        return {row["status"].status for row in self.rows_of_runs if row["rank"] in self.chosen}

    def check_floors(self) -> None:
        """Raise InternalError if a finished run is below its floor."""
        for row in self.rows_of_runs:
            check_above_floor(row["population_loss"], self.floors[row["rank"]], self.problem.predict_zero_loss)

    def _samples_of(self, runs: list[Run]) -> dict[int, Path]:
        """Return the file of samples of each seed that several runs on this machine have in common."""
        files = SweepFiles(Path(self.config.output_dir).absolute(), self.config.save_prefix)
        seeds = Counter(run.seed for run in runs) if self.config.launcher == "local" else {}
        return {seed: files.samples(seed) for seed, count in seeds.items() if count > 1}


def _identity(config: SweepConfig, problem: Problem) -> dict:
    """Return the settings that identify a study."""
    return settings_of(config, problem) | {"seed": seeds_of(config)[0]}


@functools.cache  # a layer of a checkpoint is prepared twice
def _check_edits(config: SweepConfig, trainer: Path, edits: Edits) -> None:
    """Let the training script try what a person has edited in it, before anything is computed or written.

    Raises:
        UsageError: it cannot train, or it has no metric that --metric names.
    """
    if edits == TOOLKIT:
        return
    arguments = to_arguments(config.training_settings() | {"check": True, "quiet": True})
    done = subprocess.run([sys.executable, str(trainer), *arguments], capture_output=True, text=True)
    names, said = done.stdout.split(), done.stderr.splitlines()
    if done.returncode:
        raise UsageError((said or ["it failed"])[-1].removeprefix(f"{trainer.name}: error: "))
    for warning in said:
        console.note(f"WARNING: {warning}")
    if unknown := [name for name in config.metric if name not in names]:
        raise UsageError(f"--metric {' '.join(unknown)}: {trainer.name} has the metrics {', '.join(names) or 'none'}")


def _flag_that_needs_floors(config: SweepConfig) -> str | None:
    if config.target_relative_loss is not None:
        return "--target_relative_loss"
    return None if config.stop_at == "never" else "--stop_at"


def record_of(config: SweepConfig, problem: Problem, ranks: list[int]) -> dict:
    """Return the content of the sweep's config file."""
    seeds = seeds_of(config)
    return {
        "settings": _identity(config, problem),
        "ranks": ranks,
        "seeds": seeds,
        "title": _title_of(config, problem),
        "arguments": vars(config),
        "problem": problem.describe(),
        "provenance": provenance(),
    }


def _title_of(config: SweepConfig, problem: Problem) -> str:
    name = " ".join(filter(None, [Path(config.weight_path).name, problem.weight.key]))
    inputs = problem.layer_inputs.description["kind"]
    return f"{name}, {problem.rows} × {problem.cols}: {problem.chain.describe()}, {inputs} inputs"


def _load_report() -> None:
    import ks.study.outputs  # noqa: F401 - pandas and matplotlib load while the last training runs
