"""A study of several layers of a checkpoint: one plan for all, trainings through one launcher, one summary."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ks import signals
from ks.bounds.floors import Floor
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.errors import UsageError
from ks.files.atomic import prepare_output_dir
from ks.files.layout import SweepFiles, layer_folder
from ks.files.lock import locked
from ks.files.provenance import provenance
from ks.files.status import Status
from ks.files.weights import packed
from ks.model.model_plan import LayerPlan, ModelPlan
from ks.study.checkpoint_plan import check_flags, plan_checkpoint, select
from ks.study.choices import remedies_of
from ks.study.claim import claim_folder
from ks.study.launcher import Launcher, Outcome
from ks.study.launching import launcher_of
from ks.study.run import Result, Run, result_of, seeds_of
from ks.study.trainings import finished_before, train_all
from ks.study.weight_study import WeightStudy
from ks.training.checkpoints import NOT_COMPARED
from ks.training.edits import edits_of
from ks.training.problem import choose_device


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer of the study: its flags, runs, floors and settings; its weight and its inputs do not stay in memory."""

    name: str
    config: SweepConfig
    files: SweepFiles
    runs: list[Run]
    floors: dict[int, Floor | None]
    settings: dict


class CheckpointStudy:
    """Several weights of a checkpoint, each with a results folder of its own in that of the study.

    Args:
        config: of the sweep.
        trainer: absolute path of the training script.
    Raises:
        UsageError: flags that do not go together, or no weight matches.
    """

    def __init__(self, config: SweepConfig, trainer: Path):
        check_flags(config)
        self.config, self.trainer = config, trainer
        self.selection = select(config)
        self.layers: list[_Layer] = []
        self.locks = contextlib.ExitStack()
        self.ended: list[Status] = []

    def plan_text(self) -> str:
        """Plan, and return the plan as text, for --dry_run; the floors are kept in the results folder."""
        from ks.report.model_plan_table import floors_lines, plan_lines, totals
        from ks.report.text_table import filled

        files = SweepFiles(prepare_output_dir(self.config.output_dir), self.config.save_prefix)
        with locked(files.lock, "another sweep"):
            candidates, plan = plan_checkpoint(self.config, self.selection, files)
        if plan is None:
            return "\n".join([floors_lines(candidates), str(files.layer_floors_csv)])
        return "\n".join([*filled(totals(plan)), "", plan_lines(plan), str(files.plan_json), str(files.plan_csv)])

    def launcher(self) -> Launcher:
        """Return the launcher that the flags name, with the files that trainings elsewhere read."""
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
        return launcher_of(self.config, device, len(self.selection.weights) * ranks, self.trainer, files)

    @contextlib.contextmanager
    def locked(self, files: SweepFiles) -> Iterator[None]:
        """Hold a context in which no other sweep works in the results folder, nor in those of the claimed layers."""
        with locked(files.lock, "another sweep"), self.locks:
            yield

    def claim(self, files: SweepFiles) -> None:
        """Claim the results folder, plan, and claim a folder in it for every layer that a chain replaces.

        Raises:
            UsageError: a folder holds another study, or the plan cannot be made.
        """
        config = self.config
        settings = {name: value for name, value in config.training_settings().items() if name not in NOT_COMPARED}
        settings |= {"checkpoint": self.selection.source, "seed": seeds_of(config)[0]}
        settings |= dataclasses.asdict(edits_of(self.trainer))
        record = {
            "settings": settings,
            "ranks": list(config.ranks or []),
            "seeds": seeds_of(config),
            "layers": [weight.name for weight in self.selection.weights],
            "arguments": vars(config),
            "provenance": provenance(),
        }
        claim_folder(files, [], record, config.files_read(), config.overwrite, remedies_of(config))
        from ks.report.model_plan_table import totals  # pandas loads late

        _, plan = plan_checkpoint(config, self.selection, files)
        for text in totals(plan) if plan is not None else ():
            console.note(text, config.quiet)
        for layer in self._configs(plan, files):
            signals.check()
            study = WeightStudy(layer, self.trainer)
            inside = SweepFiles(prepare_output_dir(layer.output_dir), layer.save_prefix, layer.metric)
            self.locks.enter_context(locked(inside.lock, "another sweep"))
            study.claim(inside)
            name = str(layer.weight_key)
            runs = [_named(run, name) for run in study.runs]
            self.layers.append(_Layer(name, layer, inside, runs, study.floors, study.record["settings"]))

    def _configs(self, plan: ModelPlan | None, files: SweepFiles) -> list[SweepConfig]:
        """Return the flags of every layer that is trained."""
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
                output_dir=str(layer_folder(files.directory, name)),
            )
            for name, family, ranks in chosen
        ]

    def train(self, launcher: Launcher) -> dict[Run, Result]:
        """Train every run of every layer that is not finished yet; return the results of those that ended."""
        runs = [run for layer in self.layers for run in layer.runs]
        ended = finished_before(self.config, runs, self._read_result)
        waiting = [run for run in runs if run not in ended]
        return ended | train_all(self.config, waiting, launcher, self._read_result)

    def _read_result(self, run: Run, outcome: Outcome | None = None) -> Result:
        layer = next(layer for layer in self.layers if run in layer.runs)
        return result_of(run, self.config.num_epochs, outcome, layer.settings)

    def conclude(self, files: SweepFiles, ended: dict[Run, Result]) -> list[str]:
        """Write summary and figures of every layer, and one summary over all; return the lines to print."""
        from ks.report.layers_table import layers_table
        from ks.report.summary import write_summary

        rows = []
        for layer in self.layers:
            console.note(f"{layer.name}: summary and figures", self.config.quiet)
            study = WeightStudy(layer.config, self.trainer, layer.floors)
            named = zip(study.runs, layer.runs, strict=True)
            study.conclude(layer.files, {run: ended[with_name] for run, with_name in named if with_name in ended})
            study.check_floors()
            self.ended += [row["status"].status for row in study.rows_of_runs]
            rows += study.rows
        write_summary(files, rows)
        return [layers_table(rows), str(files.summary_csv)]

    def statuses(self) -> set[Status]:
        """Return how the runs ended, once the study is concluded."""
        return set(self.ended)

    def check_floors(self) -> None:
        """Do nothing: `conclude` has checked every layer."""


def _rank(layer: LayerPlan) -> int:
    assert layer.rank is not None
    return layer.rank


def _named(run: Run, layer: str) -> Run:
    """Return a run whose name has that of its layer."""
    return dataclasses.replace(run, task=dataclasses.replace(run.task, name=f"{layer}, {run.task.name}"))
