"""`LayerPlan`: the chain and the rank that take the place of one weight, or that it stays dense."""

from dataclasses import dataclass
from typing import Any

from ks.chain.patterns import Chain, Pattern
from ks.errors import UsageError
from ks.files import columns
from ks.files.schema import Loss, Positive, Text


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
        relative_loss: the fraction of the output energy that the best known chain of this rank loses; 0 for dense.
        relative_loss_lower: no chain of this rank loses less; None if the plan minimises the loss of the model.
        itemsize: bytes of a value of W.
        interpolated: whether the losses were interpolated between the ranks for which they are known.
        shared_with: names of weights that are tied to W, whose values count once.
        inputs_sha256: hash of the moments of its inputs, `ks.moments.read.Calibration.sha256`; None for isotropic ones.
        loss_increase: predicted increase of the loss of the model per token, ½ tr(G Δ C Δᵀ), by the same chain; None
            without gradients.
        loss_increase_lower: no chain of this rank has a smaller one; None if the plan minimises the output energy.
        gradients_sha256: hash of the gradients, `ks.moments.read.Calibration.gradients_sha256`; None without them.
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
    relative_loss_lower: Loss | None = 0.0
    itemsize: Positive = 4
    interpolated: bool = False
    shared_with: tuple[Text, ...] = ()
    inputs_sha256: Text | None = None
    loss_increase: Loss | None = None
    loss_increase_lower: Loss | None = None
    gradients_sha256: Text | None = None

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
        row = {name: getattr(self, name) for name in columns.names(columns.PLAN)}
        return row | {"chain": self.family, "shared_with": " ".join(self.shared_with)}
