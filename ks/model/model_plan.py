"""`ModelPlan`, a chain and a rank for every planned weight of a model, or that it stays dense; and its JSON file."""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from ks.chain.patterns import Chain, Pattern
from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import write_json
from ks.files.columns import PLAN, chosen
from ks.files.schema import Loss, Positive, Text, read_json_as
from ks.files.table import filled, table

PLAN_VERSION = 1


class Objective(StrEnum):
    """The quantity that a plan minimises: the loss at a budget of parameters, or the parameters at a target loss."""

    BUDGET = "budget"
    TARGET = "target"


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one weight W of shape (m, n), and of all weights that are tied to it.

    Args:
        layer: name of the weight in the checkpoint, such as `encoder.layer.0.output.dense.weight`.
        rows: m.
        cols: n.
        weight_sha256: hash of W, `ks.files.weights.Weight.sha256`.
        chain: that takes the place of W; None if W stays dense.
        rank: of the chain, None without one.
        relative_loss: of the best known chain of this rank; 0 for dense.
        relative_loss_lower: no chain of this rank has a smaller relative loss.
        itemsize: bytes of a value of W.
        interpolated: whether `relative_loss` was interpolated between the ranks for which it is known.
        shared_with: names of weights that are tied to W, whose values count once.
        inputs_sha256: hash of the moments of its inputs, `ks.moments.read.Calibration.sha256`; None for isotropic ones.
    Raises:
        UsageError: a chain without a rank or the other way round, or a chain of another shape.
    """

    layer: Text
    rows: Positive
    cols: Positive
    weight_sha256: Text
    chain: Chain | None = None
    rank: Positive | None = None
    relative_loss: Loss = 0.0
    relative_loss_lower: Loss = 0.0
    itemsize: Positive = 4
    interpolated: bool = False
    shared_with: tuple[Text, ...] = ()
    inputs_sha256: Text | None = None

    def __post_init__(self):
        if (self.chain is None) != (self.rank is None):
            raise UsageError(f"{self.layer}: a chain needs a rank, and a dense layer has neither")
        if self.chain is not None and (self.chain.rows, self.chain.cols) != (self.rows, self.cols):
            raise UsageError(
                f"{self.layer} is {self.rows} × {self.cols}, its chain {self.chain.rows} × {self.chain.cols}"
            )

    @property
    def family(self) -> str:
        """Family of the chain, or 'dense'."""
        return "dense" if self.chain is None else self.chain.family

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Patterns of the chain, which must not be None."""
        assert self.chain is not None
        assert self.rank is not None
        return self.chain.patterns(self.rank)

    @property
    def dense_parameters(self) -> int:
        """m·n."""
        return self.rows * self.cols

    @property
    def parameters(self) -> int:
        """Free values of the chain, or m·n."""
        return self.dense_parameters if self.chain is None else sum(pattern.numel for pattern in self.patterns)

    @property
    def share(self) -> float:
        """`parameters` / `dense_parameters`."""
        return self.parameters / self.dense_parameters

    def row(self) -> dict[str, Any]:
        """Return the columns of `ks.files.columns.PLAN`."""
        row = {name: getattr(self, name) for name in columns.names(PLAN)}
        return row | {"chain": self.family, "shared_with": " ".join(self.shared_with)}


@dataclass(frozen=True)
class ModelPlan:
    """Chain and rank of every planned weight of a checkpoint, from one optimisation over all of them; printable.

    Args:
        layers: one plan for each weight; of tied weights the first.
        objective: 'budget', the least loss with at most the fraction `value` of the dense parameters; or 'target', the
            fewest parameters with a mean relative loss of at most `value`.
        value: of the objective.
        gap: the fraction of the loss (of the parameters, for a target) that another choice could save at most, by the
            upper bounds of the losses.
        uniform: for comparison, the plans of the same layers with the same fraction in every layer.
        rank_multiple: every rank is a multiple of it.
        checkpoint: name of its file, without folders; empty for a model in memory.
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
    def mean_relative_loss_lower(self) -> float:
        """Mean of the lower bounds of these chains."""
        return sum(layer.relative_loss_lower for layer in self.layers) / len(self.layers)

    def sentences(self) -> list[str]:
        """Return the result of the plan in words: sizes and losses, and those of the same fraction in every layer."""
        same, kept = self.as_uniform() if self.uniform else self, sum(layer.chain is None for layer in self.layers)
        megabytes = f"{self.num_bytes / 1e6:,.2f} of {self.dense_bytes / 1e6:,.2f} MB"
        lower, upper = self.mean_relative_loss_lower, self.mean_relative_loss
        at_least = f" (at least {lower:.2%} at these ranks)" if lower < upper * (1 - 1e-6) else ""
        sentences = [
            f"The plan keeps {self.share:.2%} of the parameters of {len(self.layers)} weights: {self.parameters:,} of "
            f"{self.dense_parameters:,}, {megabytes}. Biases are not counted.",
            f"The mean relative loss of the layers is {upper:.2%}{at_least}; with the same fraction of parameters in "
            f"every layer, {same.share:.2%}, it is {same.mean_relative_loss:.2%}.",
        ]
        if self.gap >= 1e-4:
            saved = "loss" if self.objective is Objective.BUDGET else "parameters"
            sentences.append(f"Another choice of these chains could save at most {self.gap:.2%} of the {saved}.")
        if any(layer.interpolated for layer in self.layers):
            sentences.append("~ marks a loss that is interpolated between ranks for which a chain is known.")
        if kept:
            sentences.append(
                f"{kept} of {len(self.layers)} layers stay dense because no chain saves enough parameters for its loss."
            )
        return sentences

    def __str__(self) -> str:
        """Return the sentences, and a table with one line for each layer."""
        shown = chosen(PLAN, ("layer", "rows", "cols", "chain", "rank", "parameters", "share", "relative_loss"))
        losses = [f"{'~' * layer.interpolated}{layer.relative_loss:.2%}" for layer in self.layers]
        rows = [layer.row() | {"relative_loss": loss} for layer, loss in zip(self.layers, losses)]
        return "\n".join([*filled(self.sentences()), "", table(shown, rows)])

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer, with the columns of `ks.files.columns.PLAN`."""
        return [layer.row() for layer in self.layers]

    def as_uniform(self) -> "ModelPlan":
        """Return the plan with the same fraction in every layer, as a plan of its own.

        Raises:
            UsageError: this plan has none.
        """
        if not self.uniform:
            raise UsageError("this plan has no uniform one beside it")
        return dataclasses.replace(self, layers=self.uniform, uniform=())

    def save(self, path) -> None:
        """Write the plan as JSON, atomically; the totals in it are for other readers, `load` ignores them.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "version": PLAN_VERSION,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "share": self.share,
            "bytes": self.num_bytes,
            "dense_bytes": self.dense_bytes,
            "mean_relative_loss": self.mean_relative_loss,
            "mean_relative_loss_lower": self.mean_relative_loss_lower,
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
        """Read what `save` wrote.

        Raises:
            UsageError: the file is missing, damaged, of a newer version, or holds no valid plan.
        """
        version = read_json_as(path, _Version, "a plan of a model").version
        if version > PLAN_VERSION:
            raise UsageError(f"{Path(path)} has version {version}; {PLAN_VERSION} is the newest known, update ks")
        return read_json_as(path, cls, "a plan of a model")


class _Version(Struct):
    version: Positive
