"""`ModelPlan`, a chain and a rank for every planned weight of a model, or that it stays dense; and its JSON file."""

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from ks.errors import UsageError
from ks.files.atomic import write_json
from ks.files.columns import PLAN, chosen
from ks.files.schema import Count, Loss, Number, Positive, PositiveLoss, Text, read_json_as
from ks.files.table import cell, filled, table
from ks.model.layer_plan import LayerPlan
from ks.model.prediction import measured_over_predicted, per_token
from ks.moments.metric import DAMPING, LossMetric

PLAN_VERSION = 2  # 1 for plans by output energy alone
NEGLIGIBLE = 1e-4  # of a loss or of the parameters
TOTALS = (  # in the file of a plan
    *("parameters", "dense_parameters", "share", "dense_bytes"),
    *("mean_relative_loss", "mean_relative_loss_lower", "loss_increase", "loss_increase_lower"),
)


class Objective(StrEnum):
    """The quantity that a plan minimises: the loss at a budget of parameters, or the parameters at a target loss."""

    BUDGET = "budget"
    TARGET = "target"
    TARGET_LOSS_INCREASE = "target_loss_increase"


@dataclass(frozen=True)
class ModelPlan:
    """Chain and rank of every planned weight of a checkpoint, from one optimisation over all of them; printable.

    Args:
        layers: one plan for each weight; of tied weights the first.
        objective: 'budget', the least loss with at most the fraction `value` of the dense parameters; 'target', the
            fewest parameters with a mean relative loss of at most `value`; or 'target_loss_increase', the fewest with a
            predicted increase of the loss of the model of at most `value`.
        value: of the objective.
        gap: the fraction of the loss (of the parameters, for a target) that another choice could save at most, by the
            upper bounds of the losses.
        uniform: for comparison, the plans of the same layers with the same fraction in every layer.
        rank_multiple: every rank is a multiple of it.
        checkpoint: name of its file, without folders; empty for a model in memory.
        coverage: how many of the parameters of the checkpoint are planned, and where the others are.
        loss_metric: whether the loss is the sum of the increases of the loss of the model, or of the relative losses.
        unit: of the loss of the model.
        measured_increase: the increase of the loss per token that was measured on the compressed model; see `measured`.
        measured_uniform: likewise, on the model compressed by `as_uniform`.
        factor: of measured over predicted increases, by `calibrated`.
        calibrated_by: number of measured plans behind `factor`.
    Raises:
        UsageError: no layers, two with one name, or a uniform plan of another number of layers.
    """

    layers: Annotated[tuple[LayerPlan, ...], Meta(min_length=1)]
    objective: Objective
    value: Loss
    gap: Loss = 0.0
    uniform: tuple[LayerPlan, ...] = ()
    rank_multiple: Positive = 1
    checkpoint: Text = ""
    coverage: Text = ""
    loss_metric: LossMetric = LossMetric.OUTPUT_ENERGY
    unit: Text = ""
    measured_increase: Number | None = None
    measured_uniform: Number | None = None
    factor: PositiveLoss | None = None
    calibrated_by: Count = 0

    def __post_init__(self):
        names = [name for layer in self.layers for name in (layer.layer, *layer.shared_with)]
        if len(set(names)) != len(names):
            raise UsageError("a plan with two entries for one weight")
        if self.uniform and len(self.uniform) != len(self.layers):
            raise UsageError(f"a plan of {len(self.layers)} layers with {len(self.uniform)} layers of the uniform plan")

    @property
    def parameters(self) -> int:
        """Values of all planned weights after compression; tied ones count once, biases not at all."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Values of all planned weights before compression; tied ones count once."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def share(self) -> float:
        """`parameters` / `dense_parameters`."""
        return self.parameters / self.dense_parameters

    @property
    def num_bytes(self) -> int:
        """Size of `parameters` in the dtypes of the checkpoint, in bytes."""
        return sum(layer.parameters * layer.itemsize for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Size of `dense_parameters` in the dtypes of the checkpoint, in bytes."""
        return sum(layer.dense_parameters * layer.itemsize for layer in self.layers)

    @property
    def mean_relative_loss(self) -> float:
        """Mean of the relative losses of the best known chains over the layers."""
        return sum(layer.relative_loss for layer in self.layers) / len(self.layers)

    @property
    def mean_relative_loss_lower(self) -> float | None:
        """Mean of the lower bounds of these chains; None if the plan minimises the loss of the model."""
        total = _total(layer.relative_loss_lower for layer in self.layers)
        return None if total is None else total / len(self.layers)

    @property
    def loss_increase(self) -> float | None:
        """Predicted increase of the loss of the model per token, the sum over the layers; None without gradients."""
        return _total(layer.loss_increase for layer in self.layers)

    @property
    def loss_increase_lower(self) -> float | None:
        """Sum of the lower bounds of these chains; None if the plan minimises the output energy."""
        return _total(layer.loss_increase_lower for layer in self.layers)

    @property
    def is_misjudged(self) -> bool:
        """Whether the plan is predicted to be better than its uniform one, and was measured to be worse."""
        if self.measured_increase is None or self.measured_uniform is None:
            return False
        predicted, uniform = (
            plan.mean_relative_loss if plan.loss_increase is None else plan.loss_increase
            for plan in (self, self.as_uniform())
        )
        return predicted < uniform and self.measured_increase > self.measured_uniform

    def sentences(self) -> list[str]:
        """Return the plan in words: reasons to distrust it, size, losses, and how far another one could lower them."""
        megabytes = f"{self.num_bytes / 1e6:,.2f} of {self.dense_bytes / 1e6:,.2f} MB"
        sentences = [
            *self._warnings(),
            f"The plan keeps {self.share:.2%} of the parameters of {len(self.layers)} weights: {self.parameters:,} of "
            f"{self.dense_parameters:,}, {megabytes}. Biases are not counted.",
            *self._losses(),
            *self._limits(),
        ]
        if any(layer.interpolated for layer in self.layers):
            sentences.append("~ marks a loss that is interpolated between ranks for which a chain is known.")
        if kept := sum(layer.chain is None for layer in self.layers):
            sentences.append(
                f"{kept} of {len(self.layers)} layers stay dense because no chain saves enough parameters for its loss."
            )
        if self.coverage:
            sentences.append(f"These weights have {self.coverage}.")
        return sentences

    def _warnings(self) -> list[str]:
        """Return the reasons to distrust the plan."""
        warnings = []
        if self.is_misjudged:
            warnings.append(
                "WARNING: this plan is predicted to be better than the same fraction of parameters in every layer, and "
                f"was measured to be worse: {self.measured_increase:.3g} against {self.measured_uniform:.3g} per "
                "token. Use that one, plan.as_uniform()."
            )
        if self.loss_metric is LossMetric.OUTPUT_ENERGY:
            advice = "Plan by the loss of the model, whose gradients these moments have"
            if self.loss_increase is None:
                advice = "Give moments with gradients (ks.collect_input_moments with loss=…)"
            warnings.append(
                "WARNING: this plan minimises the output energy that the layers lose, which is not the loss of the "
                f"model. {advice}, or compare the result with ks.compare."
            )
        return warnings

    def _losses(self) -> list[str]:
        """Return the cost of the plan and of its uniform one: increase of the loss, and lost output energy."""
        predicted, measured, sentences = self.loss_increase, self.measured_increase, []
        uniform = self.as_uniform() if self.uniform else self
        same = f" with the same fraction of parameters in every layer ({uniform.share:.2%})"
        if predicted is not None:
            beside = f"; by {uniform.loss_increase:.3g}{same}" if self.uniform else ""
            amount = per_token(predicted, self.unit)
            sentences.append(f"The loss of the model is predicted to increase by {amount}{beside}.")
        if measured is not None:
            ratio = f", {measured / predicted:.2f} times the prediction" if predicted else ""
            if measured <= 0:
                ratio = ", no increase beyond the noise of the measurement"
            beside = "" if self.measured_uniform is None else f"; {self.measured_uniform:.3g}{same}"
            sentences.append(f"Measured: {per_token(measured, self.unit)}{ratio}{beside}.")
        elif predicted is not None and self.factor is not None:
            about = per_token(self.factor * predicted, self.unit)
            sentences.append(f"By the {self.calibrated_by} plans that were measured, this is about {about}.")
        elif predicted is not None:
            sentences.append("The true increase may be twice as large; measure it (ks.compare).")
        aside = ", which the plan does not minimise" if self.loss_metric is LossMetric.MODEL_LOSS else ""
        beside = f"; {uniform.mean_relative_loss:.2%}{same}" if self.uniform else ""
        lost = f"{self.mean_relative_loss:.2%} of their output energy on average"
        return [*sentences, f"The layers lose {lost}{aside}{beside}."]

    def _limits(self) -> list[str]:
        """Return how far training could lower the loss that the plan minimises, and how far another plan could."""
        of_model = self.loss_metric is LossMetric.MODEL_LOSS
        loss = self.loss_increase if of_model else self.mean_relative_loss
        lower = self.loss_increase_lower if of_model else self.mean_relative_loss_lower
        name, form = ("the predicted increase", ".3g") if of_model else ("this average", ".2%")
        limits = []
        if loss and lower is not None and lower < loss * (1 - NEGLIGIBLE):
            limits.append(f"Training chains of these ranks can lower {name} to {lower:{form}} at best.")
        if loss and self.gap >= NEGLIGIBLE and self.objective is Objective.BUDGET:
            least = f"{loss * (1 - self.gap):{form}}"
            lowers = f"lowers {name}" + (
                f" below {least}" if least != f"{loss:{form}}" else ", to the digits shown: the plan is optimal"
            )
            limits.append(f"Without training, no other choice of ranks and families {lowers}.")
        elif self.gap >= NEGLIGIBLE:
            limits.append(
                "Without training, every choice of ranks and families that meets the target has at least "
                f"{self.parameters * (1 - self.gap):,.0f} parameters."
            )
        return limits

    def __str__(self) -> str:
        """Return the sentences, and a table with one line for each layer."""
        shapes = ("layer", "rows", "cols", "chain", "rank", "share")  # narrow enough for both losses beside each other
        losses = chosen(PLAN, ("loss_increase", "relative_loss"))
        return "\n".join([*filled(self.sentences()), "", table([*chosen(PLAN, shapes), *losses], self.marked_rows())])

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer, with the columns of `ks.files.columns.PLAN`."""
        return [layer.row() for layer in self.layers]

    def marked_rows(self) -> list[dict[str, Any]]:
        """Return the rows with ~ before every interpolated loss."""
        rows = self.rows()
        for row, column in itertools.product(rows, chosen(PLAN, ("loss_increase", "relative_loss"))):
            if row["interpolated"] and row[column.name] is not None:
                row[column.name] = "~" + cell(column, row[column.name])
        return rows

    def as_uniform(self) -> "ModelPlan":
        """Return the plan with the same fraction in every layer, as a plan of its own.

        Raises:
            UsageError: this plan has none.
        """
        if not self.uniform:
            raise UsageError("this plan has no uniform one beside it")
        return dataclasses.replace(
            self,
            layers=self.uniform,
            uniform=(),
            gap=0.0,
            measured_increase=self.measured_uniform,
            measured_uniform=None,
        )

    def measured(self, increase: float, uniform: float | None = None) -> "ModelPlan":
        """Return the plan with the increase of the loss that was measured on the compressed model.

        Args:
            increase: mean loss per token of the compressed model − that of the dense one, on the same text.
            uniform: likewise of the model that was compressed by `as_uniform`.
        """
        return dataclasses.replace(self, measured_increase=increase, measured_uniform=uniform)

    def increases(self) -> dict[str, tuple[float, float]]:
        """Return predicted and measured increase of this 'plan' and of its 'uniform' one, where both are known."""
        both = {"plan": self} | ({"uniform": self.as_uniform()} if self.uniform else {})
        return {
            name: (plan.loss_increase, plan.measured_increase)
            for name, plan in both.items()
            if plan.loss_increase is not None and plan.measured_increase is not None
        }

    def calibrated(self, plans: Iterable["ModelPlan"]) -> "ModelPlan":
        """Return the plan with the factor by which measured plans, and their uniform ones, exceed their prediction.

        Args:
            plans: of the same model and loss, with `measured`.
        Raises:
            UsageError: none of them has a predicted and a measured increase, or one is not positive.
        """
        pairs = [pair for plan in plans for pair in plan.increases().values()]
        return dataclasses.replace(self, factor=measured_over_predicted(pairs), calibrated_by=len(pairs))

    def save(self, path) -> None:
        """Write the plan as JSON, atomically; the totals in it are for other readers, `load` ignores them.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "version": PLAN_VERSION,
            "bytes": self.num_bytes,
            "damping": DAMPING if self.loss_increase is not None else None,
            **{name: getattr(self, name) for name in TOTALS},
            **dataclasses.asdict(self),
        }
        for name in ("layers", "uniform"):
            content[name] = [
                entry | {"parameters": layer.parameters, "share": layer.share}
                for entry, layer in zip(content[name], getattr(self, name))
            ]
        write_json(path, content)

    @classmethod
    def load(cls, path) -> "ModelPlan":
        """Read a plan that `save` wrote.

        Raises:
            UsageError: the file is missing, damaged, of a newer version, or holds no valid plan.
        """
        version = read_json_as(path, _Version, "a plan of a model").version
        if version > PLAN_VERSION:
            raise UsageError(f"{Path(path)} has version {version}; {PLAN_VERSION} is the newest known, update ks")
        return read_json_as(path, cls, "a plan of a model")


def _total(values: Iterable[float | None]) -> float | None:
    """Return the sum of values; None if one is missing."""
    found = [*values]
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None


class _Version(Struct):
    version: Positive
