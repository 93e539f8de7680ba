"""A study of several layers of a checkpoint: one plan, one launcher and one summary for all."""

import dataclasses
from pathlib import Path

from ks import signals
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.errors import UsageError
from ks.files.columns import PRINTED_LAYERS, SUMMARY, chosen
from ks.files.layout import SweepFiles, layer_folder
from ks.files.status import Status
from ks.files.table import table
from ks.files.weights import packed
from ks.model.candidates import floors_table
from ks.model.model_plan import LayerPlan
from ks.study.checkpoint_plan import check_flags, plan_checkpoint, select
from ks.study.folder import checkpoint_record_of, claim_folder, held, remedies_of
from ks.study.processes import Exit
from ks.study.run_all import finished_before, run_all
from ks.study.runs import Result, Run, result_of
from ks.study.weight_study import Study, WeightStudy
from ks.training.edits import edits_of
from ks.training.problem import choose_device


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer of the study: its flags, runs and settings; its weight and its inputs do not stay in memory."""

    name: str
    config: SweepConfig
    files: SweepFiles
    runs: list[Run]
    settings: dict


class CheckpointStudy(Study):
    """Several weights of a checkpoint, each with a results folder of its own in that of the study."""

    def __init__(self, config: SweepConfig, trainer: Path):
        super().__init__(config, trainer)
        self.layers: list[_Layer] = []
        self.ended: list[Status] = []

    def load(self) -> None:
        """Find the weights that the flags name; write nothing.

        Raises:
            UsageError: flags that do not go together, or no weight matches.
        """
        check_flags(self.config)
        self.selection = select(self.config)

    def plan(self) -> None:
        """Lock the results folder, compute the floors of the layers and choose a chain and a rank for each.

        The floors and the plan are kept in the folder.

        Raises:
            UsageError: the folder is in use or holds another study, or the plan cannot be made.
        """
        config, files = self.config, self.files
        self.locks.enter_context(held(files))
        if not config.dry_run:
            names = [weight.name for weight in self.selection.weights]
            record = checkpoint_record_of(config, edits_of(self.trainer), self.selection.source, names)
            claim_folder(files, [], record, config.files_read(), config.overwrite, remedies_of(config))
        self.candidates, self.planned = plan_checkpoint(config, self.selection, files)

    def plan_text(self) -> str:
        files, plan = self.files, self.planned
        if plan is None:
            return "\n".join([floors_table(self.candidates), str(files.layer_floors_csv)])
        return "\n".join([str(plan), str(files.plan_json), str(files.plan_csv)])

    def open_launcher(self) -> None:
        """Open the launcher with the files that runs elsewhere read; see `WeightStudy.open_launcher`."""
        files = {}
        if self.config.launcher == "ray":
            path = Path(self.config.weight_path).absolute()
            weights = [weight.read() for weight in self.selection.weights]
            files[str(path)] = (f"{path.stem}.pth", packed(weights, self.config.transpose))
            if self.config.inputs:
                inputs = Path(self.config.inputs).absolute()
                files[str(inputs)] = (f"inputs_{inputs.name}", inputs.read_bytes())
        device = choose_device(self.config.device)
        ranks = len(self.config.ranks or [1]) * len(self.config.seeds or [1])
        self._open(device, len(self.selection.weights) * ranks, files)

    def claim(self) -> None:
        """Claim a folder in that of the study for every layer that a chain replaces.

        Raises:
            UsageError: a folder is in use or holds another study.
        """
        for text in self.planned.sentences() if self.planned is not None else ():
            console.note(text, self.config.quiet)
        for layer in self._configs():
            signals.check()
            study = WeightStudy(layer, self.trainer)
            study.load()
            study.plan()
            study.claim()
            self.locks.push(study.locks.pop_all())
            name = str(layer.weight_key)
            runs = [_named(run, name) for run in study.chosen_runs()]
            self.layers.append(_Layer(name, layer, study.files, runs, study.record["settings"]))

    def _configs(self) -> list[SweepConfig]:
        """Return the flags of every layer that is trained."""
        plan = self.planned
        if plan is None:
            family = self.config.chains[0] if self.config.chains else self.config.chain or "monarch"
            chosen = [(weight.name, family, self.config.ranks) for weight in self.selection.weights]
        else:
            chosen = [
                (layer.layer, layer.family, self.config.ranks or (_rank(layer),))
                for layer in plan.layers
                if layer.chain is not None
            ]
        if not chosen:
            raise UsageError("every layer stays dense in this plan, so that nothing is trained; lower --budget")
        return [
            self.config.of_layer(
                name,
                chain=family,
                target_relative_loss=None if plan else self.config.target_relative_loss,
                ranks=ranks,
                output_dir=str(layer_folder(self.files.directory, name)),
            )
            for name, family, ranks in chosen
        ]

    def run(self) -> None:
        """Train every run of every layer that is not finished yet."""
        runs = [run for layer in self.layers for run in layer.runs]
        self.results = finished_before(self.config, runs, self._read_result)
        waiting = [run for run in runs if run not in self.results]
        with self.places:
            self.results |= run_all(self.config, waiting, self.launcher, self._read_result)

    def _read_result(self, run: Run, exit: Exit | None = None) -> Result:
        layer = next(layer for layer in self.layers if run in layer.runs)
        return result_of(run, self.config.num_epochs, exit, layer.settings)

    def conclude(self) -> list[str]:
        """Write summary and figures of every layer, and one summary over all; return the lines to print."""
        from ks.report.summary import write_summary

        rows = []
        for layer in self.layers:
            console.note(f"{layer.name}: summary and figures", self.config.quiet)
            study = WeightStudy(layer.config, self.trainer)
            study.load()
            study.plan()
            ended = {run.files: self.results[run] for run in layer.runs if run in self.results}
            same = {run: ended[run.files] for run in study.runs if run.files in ended}
            study.results = {run: dataclasses.replace(result, run=run) for run, result in same.items()}
            study.conclude()
            study.check_floors()
            self.ended += [row["status"].status for row in study.rows_of_runs]
            rows += study.rows
        write_summary(self.files, rows)
        shown = [row | {"verdict": row["verdict"] or row["status"]} for row in rows]
        return [table(chosen(SUMMARY, PRINTED_LAYERS), shown), str(self.files.summary_csv)]

    def statuses(self) -> set[Status]:
        return set(self.ended)

    def check_floors(self) -> None:
        """Do nothing: `conclude` has checked every layer."""


def _rank(layer: LayerPlan) -> int:
    assert layer.rank is not None
    return layer.rank


def _named(run: Run, layer: str) -> Run:
    """Return a run whose name has that of its layer."""
    return dataclasses.replace(run, task=dataclasses.replace(run.task, name=f"{layer}, {run.task.name}"))
