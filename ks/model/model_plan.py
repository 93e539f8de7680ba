"""The plan of a model: the chain and the rank of every matched weight, or that it stays dense; and its JSON file."""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from ks.chain.patterns import Chain
from ks.errors import UsageError
from ks.files.atomic import write_json
from ks.files.schema import Loss, Positive, Text, read_json_as

VERSION = 1

Names = tuple[Text, ...]


class Objective(StrEnum):
    """What a plan minimises: the loss at a budget of parameters, or the parameters at a target loss."""

    BUDGET = "budget"
    TARGET = "target"


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one weight W of shape (m, n), and of all weights that are tied to it.

    Args:
        layer: name of the weight in the checkpoint, such as `encoder.layer.0.output.dense.weight`.
        rows: m.
        cols: n.
        weight_sha256: hash of W, `ks.files.weights.Weight.sha256`.
        chain: that takes the place of W; None if W stays dense.
        rank: of the chain, None without one.
        relative_loss: share of the output energy that the best known chain of this rank loses; 0 for dense.
        relative_loss_lower: share that every chain of this rank loses at least.
        itemsize: bytes of a value of W.
        interpolated: whether `relative_loss` was interpolated between the ranks for which it is known.
        shared_with: names of weights that are tied to W, whose values count once.
        inputs_sha256: hash of the moments of its inputs, `ks.moments.read.GivenInputs.sha256`; None for isotropic ones.
    Raises:
        UsageError: a chain without a rank or the other way round, or a chain of another shape.
    """

    layer: Text
    rows: Positive
    cols: Positive
    weight_sha256: Text
    chain: Chain | None
    rank: Positive | None
    relative_loss: Loss
    relative_loss_lower: Loss
    itemsize: Positive = 4
    interpolated: bool = False
    shared_with: Names = ()
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
    def dense_parameters(self) -> int:
        """m·n."""
        return self.rows * self.cols

    @property
    def parameters(self) -> int:
        """Free values of the chain, or m·n."""
        if self.chain is None or self.rank is None:
            return self.dense_parameters
        return self.chain.parameters(self.rank)

    @property
    def share(self) -> float:
        """`parameters` / `dense_parameters`."""
        return self.parameters / self.dense_parameters

    def row(self) -> dict[str, Any]:
        """Return the columns of `ks.files.columns.PLAN`."""
        return {
            "layer": self.layer,
            "rows": self.rows,
            "cols": self.cols,
            "chain": self.family,
            "rank": self.rank,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "share": self.share,
            "relative_loss": self.relative_loss,
            "relative_loss_lower": self.relative_loss_lower,
            "interpolated": self.interpolated,
            "shared_with": " ".join(self.shared_with),
        }


@dataclass(frozen=True)
class ModelPlan:
    """Chain and rank of every matched weight of a checkpoint, the solution of one optimisation over all of them.

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
        """Values of all matched weights after compression; tied ones count once, biases not at all."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Values of all matched weights before compression; tied ones count once."""
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

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer, with the columns of `ks.files.columns.PLAN`."""
        return [layer.row() for layer in self.layers]

    def as_uniform(self) -> "ModelPlan":
        """Return the plan with the same share in every layer, as a plan of its own.

        Raises:
            UsageError: this plan has none.
        """
        if not self.uniform:
            raise UsageError("this plan has no uniform one beside it")
        return dataclasses.replace(self, layers=self.uniform, uniform=())

    def save(self, path) -> None:
        """Write the plan as JSON, atomically; totals and shares are in the file for its readers, `load` ignores them.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "version": VERSION,
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
        if version > VERSION:
            raise UsageError(f"{Path(path)} has version {version}; {VERSION} is the newest known, update ks")
        return read_json_as(path, cls, "a plan of a model")


class _Version(Struct):
    version: Positive
