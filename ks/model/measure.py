"""The loss of a whole model on batches, and a small model beside the dense one: end to end, nothing predicted."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, kl_div

from ks.errors import UsageError, one_line
from ks.model.batches import call, counted, cut, first_tensor, mask_of, num_tokens, on_device_of
from ks.model.hooks import evaluating
from ks.model.linears import unwrapped
from ks.model.losses import (
    IGNORED,
    LogitsLoss,
    Loss,
    LossLike,
    RandomDirections,
    as_loss,
    checked_loss,
    tensor_of,
)
from ks.model.timing import interleaved_medians

ROUNDS = (3, 15)  # of the forward passes, at least and at most
SECONDS = 10.0  # per batch size, if more than the fewest rounds fit into it
SIDES = ("dense", "small")
NOTHING_COUNTS = "nothing counts in these batches; give at least one, with tokens that are not masked"


@dataclass(frozen=True)
class MeasuredLoss:
    """The mean loss of a model.

    Args:
        mean: per token or example that counts.
        tokens: number of them.
        unit: of the mean, such as `nats`.
    """

    mean: float
    tokens: int
    unit: str

    @property
    def perplexity(self) -> float:
        """exp of the mean.

        Raises:
            UsageError: the loss is not in nats.
        """
        if self.unit != "nats":
            raise UsageError(f"a loss in {one_line(self.unit)!r} has no perplexity; one in nats is needed")
        return math.exp(self.mean)


def measure_loss(model: torch.nn.Module, batches: Iterable[Any], loss: LossLike) -> MeasuredLoss:
    """Return the mean loss of a model, Σ loss / number of tokens or examples that count.

    The model runs in evaluation mode and without gradients on its own device, and has its modes back afterwards.

    Args:
        model: any module.
        batches: as in `ks.collect_input_moments`.
        loss: `ks.NextTokenLoss()`, `ks.ClassifierLoss()`, or a function of the output and the batch that returns the
            sum over the tokens, which are then those of the batch's `attention_mask`.
    Raises:
        UsageError: no batch, nothing that counts, a loss that is no finite scalar, or one with random labels or
            directions, whose values do not compare.
    """
    model, loss = unwrapped(model), as_loss(loss)
    if _is_drawn(loss):
        raise UsageError(f"{one_line(loss.name)} is random, so two models do not compare in it; use ks.compare")
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            placed = on_device_of(model, batch)
            output = call(model, placed)
            total += checked_loss(loss, output, placed).item()
            count += loss.count(output, placed)
    if not count:
        raise UsageError(NOTHING_COUNTS)
    return MeasuredLoss(total / count, count, loss.unit)


@dataclass
class Comparison:
    """A small model beside the dense one on the same batches; pairs are (dense, small).

    Args:
        tokens: number of tokens that count in the masks of the batches; images count once.
        cosine: mean cosine between the outputs of both.
        relative_change: ‖Δ‖ / ‖outputs of the dense model‖ over all outputs.
        parameters, num_bytes: of the models; tied tensors count once.
        milliseconds: median of a forward pass, by the size of the batch.
        increase: of the loss per token of `tokens`, as plans predict it; None without a loss. For labels that are drawn
            from the dense model it is the divergence, for random directions half the squared change of the outputs.
        unit: of the increase.
        losses: None without a loss, or for one with random labels or directions.
        divergence: KL(dense ‖ small) of the distributions, mean over the tokens of the loss, in nats; None unless the
            loss is one of logits.
    """

    tokens: int
    cosine: float
    relative_change: float
    parameters: tuple[int, int]
    num_bytes: tuple[int, int]
    milliseconds: dict[int, tuple[float, float]]
    increase: float | None = None
    unit: str = ""
    losses: tuple[MeasuredLoss, MeasuredLoss] | None = None
    divergence: float | None = None

    def __str__(self) -> str:
        """Return a table with a line for each quantity."""
        rows: list[tuple[str, ...]] = [("", "dense", "small")]
        if self.losses is not None:
            rows.append((f"loss, {self.unit}", *(f"{each.mean:.4f}" for each in self.losses)))
            if self.unit == "nats":
                rows.append(("perplexity", *(f"{each.perplexity:,.2f}" for each in self.losses)))
        if self.increase is not None:
            rows.append((f"increase per token, {self.unit}", "", f"{self.increase:.4g}"))
        if self.divergence is not None:
            rows.append(("KL divergence of the logits, nats", "", f"{self.divergence:.4f}"))
        rows += [
            ("mean cosine of the outputs", "", f"{self.cosine:.4f}"),
            ("relative change of the outputs", "", f"{self.relative_change:.1%}"),
            ("parameters", *(f"{count:,}" for count in self.parameters)),
            ("MB", *(f"{count / 1e6:,.1f}" for count in self.num_bytes)),
        ]
        for size, pair in self.milliseconds.items():
            rows.append((f"forward pass at batch {size}, ms", *(f"{value:,.1f}" for value in pair)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows
        )


def compare(
    model: torch.nn.Module, small: torch.nn.Module, batches: Iterable[Any], loss: LossLike | None = None
) -> Comparison:
    """Compare a compressed model with the dense one, end to end.

    Both run in evaluation mode and without gradients, each on its own device. Outputs are the logits, the last hidden
    states, or the tensor that the model returns, at the tokens that count; for `ks.RandomDirections`, the
    values of its function. The forward passes are timed in turns, on the first batch and on its first entry.

    Args:
        model: the dense one.
        small: with outputs of the same shape.
        batches: that neither model has been calibrated on, as in `ks.collect_input_moments`.
        loss: as in `ks.measure_loss`, or one with random labels or directions; None compares the outputs alone.
    Returns:
        a `Comparison`; print it for a table.
    Raises:
        UsageError: as `ks.measure_loss`, no batch, or outputs that do not compare.
    """
    models, loss = (unwrapped(model), unwrapped(small)), None if loss is None else as_loss(loss)
    sums: defaultdict[str, float] = defaultdict(float)
    milliseconds: dict[int, tuple[float, float]] = {}
    with evaluating(models[0]), evaluating(models[1]):
        for batch in batches:
            placed = [on_device_of(each, batch) for each in models]
            for name, value in _sums([call(each, given) for each, given in zip(models, placed)], placed, loss).items():
                sums[name] += value
            if not milliseconds:
                sizes = sorted({1, len(first_tensor(batch))})
                milliseconds = {size: _times(models, placed, size) for size in sizes}
    tokens, vectors, count = (int(sums[name]) for name in ("tokens", "vectors", "count"))
    if not (tokens and vectors and count):
        raise UsageError(NOTHING_COUNTS)
    (dense, dense_bytes), (compressed, small_bytes) = map(_size, models)
    found = Comparison(
        tokens=tokens,
        cosine=sums["cosine"] / vectors,
        relative_change=math.sqrt(sums["change"] / sums["energy"]) if sums["energy"] else math.inf,
        parameters=(dense, compressed),
        num_bytes=(dense_bytes, small_bytes),
        milliseconds=milliseconds,
    )
    if loss is not None:
        found.increase, found.unit = sums["increase"] / tokens, loss.unit
        if "small" in sums:
            before, after = (MeasuredLoss(sums[side] / count, count, loss.unit) for side in SIDES)
            found.losses = before, after
        if "divergence" in sums:
            found.divergence = sums["divergence"] / count
    return found


def _sums(outputs: Sequence[Any], batches: Sequence[Any], loss: Loss | None) -> dict[str, float]:
    """Return sums over the outputs of both models for a batch, which is on the device of each."""
    dense, small = (_vectors(output, batch, loss) for output, batch in zip(outputs, batches))
    if dense.shape != small.shape:
        raise UsageError(
            f"outputs of shape {tuple(dense.shape)} and {tuple(small.shape)} do not compare; give two models of one "
            "kind"
        )
    small = small.to(dense)
    sums: dict[str, float] = {
        "tokens": num_tokens(batches[0]),
        "vectors": len(dense),
        "cosine": cosine_similarity(dense, small, dim=-1).sum(dtype=torch.float64).item(),
        "change": (small - dense).square().sum(dtype=torch.float64).item(),
        "energy": dense.square().sum(dtype=torch.float64).item(),
    }
    if loss is None or isinstance(loss, RandomDirections):
        return sums | {"count": len(dense), "increase": sums["change"] / 2}
    sums["count"] = loss.count(outputs[0], batches[0])
    if isinstance(loss, LogitsLoss):
        logits = [tensor_of(each, "logits") for each in outputs]
        kept = loss.targets(logits[0], batches[0]) != IGNORED
        dense, small = (each.to(kept.device)[kept].float().log_softmax(-1) for each in logits)
        sums["divergence"] = kl_div(small, dense, reduction="sum", log_target=True).item()
    if _is_drawn(loss):
        return sums | {"increase": sums["divergence"]}
    before, after = (checked_loss(loss, *each).item() for each in zip(outputs, batches))
    return sums | {"dense": before, "small": after, "increase": after - before}


def _vectors(output: Any, batch: Any, loss: Loss | None) -> torch.Tensor:
    """Return the outputs that are compared, shape (N, d), float32 or float64."""
    if isinstance(loss, RandomDirections):
        found, mask = loss.function(output, batch), None
    else:
        found, mask = tensor_of(output, "logits", "last_hidden_state"), mask_of(batch)
    fits = mask is not None and mask.shape == found.shape[:-1]
    return counted(found if found.dtype == torch.float64 else found.float(), mask if fits else None)


def _size(model: torch.nn.Module) -> tuple[int, int]:
    """Return the number of values of the parameters of a model, and of their bytes."""
    return sum(each.numel() for each in model.parameters()), sum(each.nbytes for each in model.parameters())


def _is_drawn(loss: Loss) -> bool:
    """Whether the value of a loss depends on random labels or directions."""
    return isinstance(loss, RandomDirections) or (isinstance(loss, LogitsLoss) and loss.labels == "model")


def _times(models: Sequence[torch.nn.Module], batches: Sequence[Any], size: int) -> tuple[float, float]:
    """Return the median milliseconds of a forward pass of both models on the first entries of a batch, in turns."""
    forward = {side: partial(call, model, cut(batch, 0, size)) for side, model, batch in zip(SIDES, models, batches)}
    device = next((each.device for each in models[0].parameters()), torch.device("cpu"))
    seconds = interleaved_medians(forward, device, SECONDS, rounds=ROUNDS)
    return 1e3 * seconds["dense"], 1e3 * seconds["small"]
