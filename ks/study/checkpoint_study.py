"""A study of several layers of a checkpoint: one plan, one launcher and one summary for all."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ks import signals
from ks.chain.patterns import Chain
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import delete_leftovers, write_csv, write_json
from ks.files.layout import layer_folder
from ks.files.ownership import check_free, recorded
from ks.files.provenance import provenance
from ks.files.status import Status
from ks.files.weights import packed
from ks.model.allocate import USUAL_FAMILIES, Goal, allocate, goal_of, plan_metric
from ks.model.candidates import check_inputs, find_candidates, floors_table
from ks.model.layer_weights import select_weights
from ks.model.model_plan import ModelPlan
from ks.moments.moments_file import as_moments
from ks.study.folder import checkpoint_record_of, claim_folder, held
from ks.study.processes import Exit
from ks.study.run_all import finished_before, run_all
from ks.study.runs import Result, Run, result_of, seeds_of
from ks.study.weight_study import Study, WeightStudy
from ks.training.criterion_identity import edits_of
from ks.training.layer_inputs import ISOTROPIC_NOTE
from ks.training.problem import chain_of, choose_device


class CheckpointStudy(Study):
    """Several weights of a checkpoint, each with a results folder of its own in that of the study."""

    planned: ModelPlan | None = None

    def load(self) -> None:
        """Find the weights that --weight_key matches, or all 2-D weights of the file; write nothing.

        Raises:
            UsageError: flags that do not go together, no weight matches, or one has no inputs in the file of --inputs.
        """
        config = self.config
        self.goal = goal_of(config.budget, config.target_relative_loss, config.target_loss_increase)
        _check_flags(config, self.goal)
        self.selection = select_weights(config.weight_path, config.weight_key or "**", config.transpose)
        moments = as_moments(config.inputs)
        self.loss_metric = plan_metric(config.loss_metric, moments, self.goal)
        check_inputs(self.selection.weights, moments, self.loss_metric)

    def plan(self) -> None:
        """Lock the results folder, compute the floors of the layers and choose a chain and a rank for each.

        Writes the floors, which the next plan reads, a table of them, and the plan.

        Raises:
            UsageError: the folder is in use, holds another study or a file of the user's, or no plan meets the budget.
        """
        config, files = self.config, self.files
        self.locks.enter_context(held(files))
        if not config.dry_run:
            names = [weight.name for weight in self.selection.weights]
            record = checkpoint_record_of(config, edits_of(self.trainer), self.selection.source, names)
            claim_folder(config, [], record)
        delete_leftovers([*files.planned(), *files.outputs()])
        owned = recorded(files.plan_record)
        check_free(files.planned(), owned, config.files_read(), "choose another --output_dir or --save_prefix")
        names = [path.name for path in files.planned()]
        write_json(files.plan_record, {"files": names, "arguments": vars(config), "provenance": provenance()})
        for text in (*self.selection.notes, *([] if config.inputs else [ISOTROPIC_NOTE])):
            console.note(text, config.quiet)

        def make(rows: int, cols: int, family: str) -> Chain:
            return chain_of(dataclasses.replace(config, chain=family, chains=None), rows, cols)

        self.candidates = find_candidates(
            self.selection.weights,
            make,
            config.chains or (USUAL_FAMILIES[self.loss_metric] if config.chain is None else (config.chain,)),
            config.inputs,
            files.floors,
            choose_device(config.device),
            lambda text: console.note(text, config.quiet),
            signals.check,
            self.loss_metric,
        )
        names = [name for entry in self.candidates for name in (entry.dense.layer, *entry.dense.shared_with)]
        learnable = tuple(weight for weight in self.selection.weights if weight.name in names)
        self.selection = dataclasses.replace(self.selection, weights=learnable)
        found = ((entry, floors) for entry in self.candidates for floors in entry.floors)
        rows = (entry.plan(floors, int(rank)).row() for entry, floors in found for rank in floors.ranks)
        write_csv(files.layer_floors_csv, columns.names(columns.LAYER_FLOORS), rows)
        if self.goal is not None:
            self.planned = allocate(self.candidates, self.goal, config.rank_multiple, self.selection)
            self.planned.save(files.plan_json)
            write_csv(files.plan_csv, columns.names(columns.PLAN), self.planned.rows())

    def plan_text(self) -> str:
        files, plan = self.files, self.planned
        if plan is None:
            return "\n".join([floors_table(self.candidates), str(files.layer_floors_csv)])
        return "\n".join([str(plan), str(files.plan_json), str(files.plan_csv)])

    def runs_at_most(self) -> int:
        return len(self.selection.weights) * len(self.config.ranks or [1]) * len(seeds_of(self.config))

    def packed_files(self) -> tuple[bytes, bytes]:
        weights = [weight.read() for weight in self.selection.weights]
        inputs = Path(self.config.inputs).read_bytes() if self.config.inputs else b""
        return packed(weights, self.config.transpose), inputs

    def claim(self) -> None:
        """Claim a folder in that of the study for every layer that a chain replaces.

        Raises:
            UsageError: a folder is in use or holds another study, or every layer stays dense.
        """
        for text in self.planned.sentences() if self.planned is not None else ():
            console.note(text, self.config.quiet)
        self.settings: dict[Run, dict] = {}  # of the study of its layer, for each run
        for study in self._layer_studies():
            signals.check()
            study.claim()
            self.locks.push(study.locks.pop_all())
            self.settings |= dict.fromkeys(study.chosen_runs(), study.record["settings"])

    def _layer_studies(self) -> Iterator[WeightStudy]:
        """Yield the planned study of each layer to train, one at a time, since memory may not hold all weights."""
        config, plan = self.config, self.planned
        if plan is None:
            family = config.chains[0] if config.chains else config.chain or "monarch"
            chosen = [(weight.name, family, config.ranks) for weight in self.selection.weights]
        else:
            chosen = [(layer.layer, layer.family, config.ranks or (layer.rank,)) for layer in plan.layers if layer.rank]
        if not chosen:
            raise UsageError("every layer stays dense in this plan, so that nothing is trained; lower --budget")
        for name, family, ranks in chosen:
            folder = str(layer_folder(self.files.directory, name))
            flags = {"chain": family, "ranks": ranks, "loss_metric": self.loss_metric.value, "output_dir": folder}
            flags |= {"target_relative_loss": None, "target_loss_increase": None}
            study = WeightStudy(config.of_layer(name, **flags), self.trainer, self.start, name)
            study.load()
            study.plan()
            yield study

    def run(self) -> None:
        """Train every run of every layer that is not finished yet."""
        runs = list(self.settings)
        self.results = finished_before(self.config, runs, self._read_result)
        waiting = [run for run in runs if run not in self.results]
        config = dataclasses.replace(self.config, loss_metric=self.loss_metric.value)
        with self.places:
            run_all(config, waiting, self.launcher, self._read_result, self.results, self.until_the_last(runs))

    def _read_result(self, run: Run, exit: Exit | None = None) -> Result:
        return result_of(run, self.config.num_epochs, exit, self.settings[run])

    def conclude(self) -> list[str]:
        """Write summary, figures and report of every layer and of the model; return the lines to print."""
        from ks.report.figures.draw import plans_figures
        from ks.report.model_report import measured_plans, write_model_report
        from ks.report.read_results import read_study
        from ks.report.summary import summary_table, write_summary

        rows, self.ended = [], set[Status]()
        result_in = {run.files: result for run, result in self.results.items()}
        for study in self._layer_studies():
            console.note(f"{study.config.weight_key}: summary and figures", self.config.quiet)
            study.results = {run: result_in[run.files] for run in study.runs if run.files in result_in}
            study.conclude()
            study.check_floors()
            self.ended |= {row["status"].status for row in study.rows_of_runs}
            rows += study.rows
        write_summary(self.files, rows)
        try:
            measured = measured_plans(self.files.directory)
        except UsageError as error:
            console.note(f"WARNING: the report has no measured plans, because {error}")
            measured = {}
        write_model_report(read_study(self.files), self.files, measured, plans_figures([*measured.values()]))
        return [summary_table(rows), str(self.files.summary_csv), str(self.files.report)]

    def statuses(self) -> set[Status]:
        return self.ended


def _check_flags(config: SweepConfig, goal: Goal | None) -> None:
    """Raise UsageError if flags do not go together in a study of several layers."""
    if config.row_splits is not None or config.col_splits is not None:
        raise UsageError("--row_splits and --col_splits are for one weight; name families by --chains")
    if goal is None:
        if config.rank_multiple != 1:
            raise UsageError("--rank_multiple is for a plan; give --budget or a target too")
        if len(config.chains or ()) > 1 and not config.dry_run:
            raise UsageError(
                f"--chains {' '.join(config.chains or ())}: give --budget or a target to choose one for each layer, or "
                "one --chain for all; --dry_run compares them"
            )
    if config.chain == "lowrank_butterfly":
        raise UsageError("--chain lowrank_butterfly has no floor, and a plan needs one; choose another family")
    for name in ("inputs_key", "fit_bias"):
        if getattr(config, name):
            raise UsageError(f"--{name} is for one weight; leave it out in a study of several layers")
