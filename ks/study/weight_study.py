"""A study of one weight: the floors of a chain family, one run for each rank, summary and figures."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Self

from ks.bounds.floors import Floor
from ks.bounds.rank_floors import Certified, floor_rows, plan_rows
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.cli.parser import to_arguments
from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import delete_leftovers, write_csv
from ks.files.status import Status, ended_well
from ks.files.table import filled, table
from ks.files.weights import packed
from ks.moments.read import packed_inputs
from ks.report.answer import answer, named_row, target_note
from ks.report.verdict import check_above_floor
from ks.report.words import Words
from ks.study.folder import claim_folder, held, record_of, refuse_another_study, study_in
from ks.study.launcher import launcher_of
from ks.study.processes import Exit, Start, wait_for_one
from ks.study.run_all import finished_before, run_all
from ks.study.runs import (
    Result,
    Run,
    as_rank,
    ranks_of,
    result_of,
    runs_of,
    seeds_of,
    stop_losses,
    trained_ranks,
    were_disturbed,
)
from ks.study.study_floors import certify, find_facts, is_large, keep_floors, plan_floors, ranks_of_answer
from ks.training.criterion_identity import TOOLKIT, Edits, edits_of
from ks.training.problem import chain_notes, relative_target, resolve
from ks.training.run_state import changes, settings_in
from ks.training.samples import samples_in_files


class Study:
    """A study of any kind, with the steps load, plan, claim, run and conclude, in this order.

    load reads and checks what the flags name. plan computes floors and chooses what to train. claim takes the results
    folder. run trains whatever has not ended well before. conclude writes summary and figures.
    Leaving the study as a context stops whatever still runs, then lets other sweeps into the folder.

    The trainer is the absolute path of the training script, and `start` starts a run of it on this machine.
    """

    def __init__(self, config: SweepConfig, trainer: Path, start: Start):
        self.config, self.trainer, self.start = config, trainer, start
        self.files = config.files()
        self.results: dict[Run, Result] = {}
        self.places = contextlib.ExitStack()  # the launcher, until all has run
        self.locks = contextlib.ExitStack()  # of the folders, until all is written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self.locks:
            self.places.close()

    def runs_at_most(self) -> int:
        """Return the number of runs that a sweep with this plan trains, if none is finished."""
        raise NotImplementedError

    def check_folder(self) -> None:
        """Raise UsageError if the results folder is in use or holds another study, before floors are computed."""

    def packed_files(self) -> tuple[bytes, bytes]:
        """Return the content of files with the weights and, with --inputs, the inputs of the runs alone."""
        raise NotImplementedError

    def open_launcher(self) -> None:
        """Open the launcher with the files that runs elsewhere read, before anything of the folder is claimed.

        Raises:
            UsageError: places that do not exist, or a cluster that cannot be joined.
        """
        config, files = self.config, {}
        if config.launcher == "ray":
            weights, inputs = self.packed_files()
            weight_path, *inputs_path = (path.absolute() for path in config.files_read())
            files[str(weight_path)] = (f"{weight_path.stem}.pth", weights)
            files |= {str(path): (f"inputs_{path.name}", inputs) for path in inputs_path}
        launcher = launcher_of(config, self.runs_at_most(), self.trainer, files, self.start)
        self.launcher = self.places.enter_context(launcher)

    def until_the_last(self, runs: list[Run]) -> Generator[None]:
        """Wait in steps until all of these runs but one have ended, and load what `conclude` needs."""
        while len(self.results) < len(runs) - 1:
            yield
        import ks.study.outputs  # noqa: F401 - with pandas and matplotlib

        yield

    def check_floors(self) -> None:
        """Raise InternalError if a finished run is below its floor, unless `conclude` has done so."""


class WeightStudy(Study):
    """The ranks of one chain family on one weight; `layer` is its name in a study of several."""

    found: Mapping[int, Certified] = {}  # lower bounds, while the last run trained, of ranks that the answer may need

    def __init__(self, config: SweepConfig, trainer: Path, start: Start, layer: str = ""):
        super().__init__(config, trainer, start)
        self.layer = layer

    def load(self) -> None:
        """Read the weight, its inputs and the record of the study that the folder holds; write nothing.

        Raises:
            UsageError: a weight, inputs or an edited training script that cannot be studied.
        """
        config = self.config
        self.problem = problem = resolve(config, edits_of(self.trainer))
        _check_edits(config, self.trainer, problem.edits, self.start)
        self.target = target = relative_target(config, problem)
        self.words = Words(problem.loss_metric, problem.unit, problem.predict_zero_loss)
        if not problem.edits.criterion_is_ours and (target is not None or config.stop_at != "never"):
            flag = "--stop_at" if target is None else "--target_relative_loss"
            raise UsageError(
                f"{flag} needs the criterion mean_squared_error, and that of {self.trainer.name} is "
                f"{problem.edits.criterion}; leave it out"
            )
        self.record = record_of(config, problem, [])
        study = study_in(config)
        same = study is not None and not changes(settings_in(study.settings, study.loss), self.record["settings"])
        self.before = study if same else None

    def plan(self) -> None:
        """Compute the floors that cannot wait, and choose the ranks and when a run may stop; write nothing.

        Raises:
            UsageError: ranks that cannot be studied, or --stop_at without what it refers to.
        """
        config, problem = self.config, self.problem
        self.planned = plan_floors(config, problem)
        self.chosen, self.ranks = ranks_of(config, self.planned, self.before, self.target)
        if self.before and not config.ranks and (added := self.chosen.difference(self.before.ranks)):
            new, old = (" ".join(map(str, sorted(ranks))) for ranks in (added, self.before.ranks))
            console.note(
                "the target is new to this study, so the ranks around the smallest that can reach it are trained too: "
                f"{new}; --ranks {old} trains no others",
                config.quiet,
            )
        if config.dry_run:
            certify(self.planned, [], self.ranks, config.tight_bounds)
        stops = stop_losses(config, {} if self.floors_can_wait() else self.floors, self.target)
        self.runs = runs_of(config, self.ranks, self.trainer, stops, self.layer)
        self.record["ranks"] = self.ranks
        self.trained = trained_ranks(self.ranks, problem.chain.saturation_rank, self.files.directory)

    @property
    def floors(self) -> dict[int, Floor | None]:
        """The floors of the ranks; computed when they are first asked for."""
        return self.planned.floors(self.ranks)

    def plan_text(self) -> str:
        """Return the plan, for --dry_run; with --verbose, the commands of the runs too."""
        for text in self.problem.notes:
            console.note(text, self.config.quiet)
        rows = [self.words.in_its_unit(row) for row in plan_rows(self.planned, self.floors)]
        shown = self.words.with_units(columns.PLANNED_RANKS)
        lines = [self.record["title"], *self.remarks(), "", table(shown, rows), ""]
        if not self.config.verbose:
            return "\n".join([*lines, "Nothing was trained or written; --verbose shows patterns and commands."])
        lines += [table(columns.PATTERNS, rows), ""]
        return "\n".join([*lines, *(shlex.join(run.task.command) for run in self.runs if run.rank in self.chosen)])

    def remarks(self) -> list[str]:
        """Return notes on the chain family, and on the target as far as quick bounds tell."""
        notes, planned = chain_notes(self.problem.chain), self.planned
        if self.target is None or not planned.has_floors:
            return notes
        found = planned.target_ranks(self.target)
        return [*notes, target_note(found, planned.metric.inputs.is_isotropic, self.words)]

    def check_folder(self) -> None:
        if self.files.directory.is_dir():
            with held(self.files):
                refuse_another_study(self.config, self.record["settings"])

    def runs_at_most(self) -> int:
        return len(self.chosen) * len(seeds_of(self.config))

    def packed_files(self) -> tuple[bytes, bytes]:
        config, weight = self.config, self.problem.weight
        inputs = packed_inputs(config.inputs, config.inputs_key or weight.key) if config.inputs else b""
        return packed([weight], config.transpose), inputs

    def claim(self) -> None:
        """Claim the results folder, and write the floors of every rank into it unless they can wait for the runs."""
        config, files = self.config, self.files
        self.locks.enter_context(held(files))
        delete_leftovers(files.all(seeds_of(config)))
        claim_folder(config, self.runs, self.record)
        if not self.floors_can_wait():
            self.write_floors()

    def floors_can_wait(self) -> bool:
        """Return whether nothing but the report needs floors, and they take a second: while the first runs train.

        Those of a layer cannot: its weight does not stay in memory until then.
        """
        config, planned = self.config, self.planned
        needed = self.layer or config.dry_run or config.stop_at != "never" or self.target is not None
        return not needed and planned.has_floors and planned.curve_is_exact and not is_large(self.problem)

    def write_floors(self) -> None:
        """Write the floors of every rank into the results folder, and the bounds for a rerun."""
        keep_floors(self.config, self.problem, self.planned)
        rows = floor_rows(self.planned, self.problem.predict_zero_loss)
        write_csv(self.files.floor_csv, columns.names(columns.FLOOR), rows)

    def run(self) -> None:
        """Train the chosen ranks that have not ended well before, the largest first."""
        same = [
            f"rank {rank} has the same chain as rank {trained}: rank {trained} is trained for both"
            for rank, trained in self.trained.items()
            if rank != trained and rank in self.chosen
        ]
        for text in (*self.problem.notes, *self.remarks(), *same):
            console.note(text, self.config.quiet)
        chosen, results = self.chosen_runs(), self.results
        results |= finished_before(self.config, chosen, self.read_result)
        waiting = sorted((run for run in chosen if run not in results), key=lambda run: (-run.rank, run.seed))
        seeds = Counter(run.seed for run in waiting) if self.config.launcher == "local" else {}
        shared = {seed: self.files.samples(seed) for seed, count in seeds.items() if count > 1}
        best_known: dict[int, float] = {}
        samples = samples_in_files(self.config, self.problem, shared)
        with self.places, samples as drawing, closing(self._prepare(best_known)) as steps:
            meanwhile = itertools.chain(drawing, steps)
            run_all(self.config, waiting, self.launcher, self.read_result, results, meanwhile, best_known)

    def _prepare(self, best_known: dict[int, float]) -> Generator[None]:
        """Do in short steps, while runs train, whatever `conclude` would take its time for.

        The first step writes the floors, and adds the best known loss of each rank in the unit of the curves.
        """
        if self.floors_can_wait():
            self.write_floors()
        unit = self.problem.predict_zero_loss
        best_known |= {rank: floor.upper * unit for rank, floor in self.floors.items() if floor is not None}
        yield
        yield from self.until_the_last(self.chosen_runs())
        from ks.study.outputs import rehearse, summarise

        results = [result for result in self.results.values() if ended_well(result.ending)]
        if not results:
            return
        _, rows = summarise(self.config, self.problem, self.planned, results)
        ranks = ranks_of_answer(rows, self.planned, self.target)
        guess = copy.copy(self.planned)
        guess.known = dataclasses.replace(guess.known, certified={**guess.known.certified})
        self.found = guess.known.certified
        with ThreadPoolExecutor(1) as pool:  # since a bound takes longer than a step may
            done = pool.submit(certify, guess, ranks, self.ranks, self.config.tight_bounds)
            while not done.done():
                yield
        yield from rehearse(self.config, rows)

    def chosen_runs(self) -> list[Run]:
        """Return the runs that are to be trained, or were before, for the chosen ranks."""
        ranks = {self.trained[rank] for rank in self.chosen}
        return [run for run in self.runs if run.rank in ranks]

    def read_result(self, run: Run, exit: Exit | None = None) -> Result:
        """Return the result of a run; one that was trained on another weight or other inputs has failed."""
        return result_of(run, self.config.num_epochs, exit, self.record["settings"])

    def _all_results(self) -> list[Result]:
        """Return the results of all runs of the study; ranks above saturation have that of the trained rank."""
        ranks = set(self.trained.values())
        runs = [run for run in self.runs if run.rank in ranks]
        ended = {(run.rank, run.seed): self.results.get(run) or self.read_result(run) for run in runs}
        return [as_rank(ended[self.trained[run.rank], run.seed], run) for run in self.runs]

    def conclude(self) -> list[str]:
        """Certify the bounds that the answer needs, write summary and figures; return the lines to print."""
        from ks.report.sentences import advice
        from ks.report.summary import summary_table
        from ks.study.outputs import summarise, write_outputs

        target, seconds = self.target, self.config.tight_bounds
        results = self._all_results()
        _, rows = summarise(self.config, self.problem, self.planned, results)
        certify(self.planned, ranks_of_answer(rows, self.planned, target), self.ranks, seconds, self.found)
        self.rows_of_runs, self.rows = summarise(self.config, self.problem, self.planned, results)
        facts = find_facts(self.rows, self.planned, target, seconds)
        if named := named_row(self.rows, target):
            disturbed = self.config.launcher != "slurm" and were_disturbed(results, named["rank"])
            facts = dataclasses.replace(facts, disturbed=disturbed)
        self.write_floors()
        self.record["facts"] = dataclasses.asdict(facts)
        self.record["answer"] = answer(self.rows, facts, target)
        self.record["advice"] = advice(self.rows, self.problem.sampling)
        written = write_outputs(self.config, self.record, results, self.rows_of_runs, self.rows)
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
        floors = self.floors
        for row in self.rows_of_runs:
            check_above_floor(row["population_loss"], floors[row["rank"]], self.problem.predict_zero_loss)


@functools.cache  # a layer of a checkpoint is prepared twice
def _check_edits(config: SweepConfig, trainer: Path, edits: Edits, start: Start) -> None:
    """Let the training script try what a person has edited in it, before anything is computed or written.

    Raises:
        UsageError: it cannot train, or it has no metric that --metric names.
    """
    if edits == TOOLKIT:
        return
    command = [sys.executable, str(trainer), *to_arguments(config.training_settings() | {"check": True, "quiet": True})]
    environment = os.environ | {"PYTHONBREAKPOINT": "0"}  # a breakpoint is for the runs
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(command, environment, stdout.fileno(), stderr.fileno(), [])
        wait_for_one([process], math.inf)
        stdout.seek(0), stderr.seek(0)
        names, messages = stdout.read().split(), stderr.read().splitlines()
    if process.returncode:
        raise UsageError((messages or ["it failed"])[-1].removeprefix(f"{trainer.name}: error: "))
    for warning in messages:
        console.note(f"WARNING: {warning}")
    if unknown := [name for name in config.metric if name not in names]:
        raise UsageError(f"--metric {' '.join(unknown)}: {trainer.name} has the metrics {', '.join(names) or 'none'}")
