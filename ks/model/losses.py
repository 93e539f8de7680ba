"""Losses of a model whose gradients are collected, summed over all tokens, examples or embeddings that count."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn.functional import cross_entropy, normalize

from ks.errors import UsageError, one_line
from ks.model.batches import first_tensor, mask_of, num_tokens

IGNORED = -100  # the label that torch and transformers leave out


@runtime_checkable
class Loss(Protocol):
    """A loss of a model's output for a batch, with the number of tokens or examples that it sums over."""

    name: str  # kept with the gradients; those of two names are not merged
    unit: str  # such as `nats`

    def __call__(self, output: Any, batch: Any) -> torch.Tensor:
        """Return the loss, one number: the sum over all that counts, not its mean."""

    def count(self, output: Any, batch: Any) -> int:
        """Return the number of tokens or examples that count."""


class LogitsLoss:
    """The cross-entropy −log p(label) of a model's logits, summed over all labels but −100.

    Args:
        labels: 'text' takes the labels of the data; 'model' draws them from the model's own distribution at the same
            places, whose G is the Fisher information.
        seed: of the labels that are drawn.
    Raises:
        UsageError: other labels.
    """

    unit = "nats"

    def __init__(self, labels: str = "text", seed: int = 0):
        if labels not in ("text", "model"):
            raise UsageError(f"labels {one_line(labels)!r}: 'text' or 'model' is allowed")
        self.labels, self.name = labels, f"{type(self).__name__}, labels of the {labels}"
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Any, batch: Any) -> torch.Tensor:
        """Return Σ −log p(label) in float32, or float64 for float64 logits."""
        logits = tensor_of(output, "logits")
        targets = self.targets(logits, batch)
        if self.labels == "model":
            targets = torch.where(targets == IGNORED, targets, self._drawn(logits.detach()))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def count(self, output: Any, batch: Any) -> int:
        """Return the number of labels."""
        return int((self.targets(tensor_of(output, "logits"), batch) != IGNORED).sum())

    def targets(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the label of each row of logits, −100 where there is none."""
        raise NotImplementedError

    def _drawn(self, logits: torch.Tensor) -> torch.Tensor:
        """Return a class for each row, by its probability."""
        cumulated = logits.float().softmax(-1).cumsum(-1)
        places = torch.rand(*logits.shape[:-1], 1, generator=self._generator).to(logits.device)
        found = torch.searchsorted(cumulated, places * cumulated[..., -1:], right=True)
        return found.clamp_(max=logits.shape[-1] - 1).squeeze(-1)


class NextTokenLoss(LogitsLoss):
    """The loss of a causal language model: −log p of each token given those before it in its sequence.

    The tokens are `labels` or `input_ids` of a mapping, or the batch itself, or its first tensor. A pair counts if
    `attention_mask` is 1 for both of its tokens, and the second one is not −100.
    """

    def targets(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the next token of each token, shape (batch, tokens), −100 where none counts."""
        if isinstance(batch, Mapping):
            tokens = batch["labels"] if "labels" in batch else batch["input_ids"]
        else:
            tokens = first_tensor(batch)
        if tokens.shape != logits.shape[:-1] or tokens.is_floating_point():
            raise UsageError(
                f"tokens of shape {tuple(tokens.shape)} and {tokens.dtype}, logits of shape {tuple(logits.shape)}: "
                "integers (batch, tokens) and logits (batch, tokens, vocabulary) are needed"
            )
        mask = mask_of(batch)
        if mask is not None:
            kept = mask.to(tokens.device, torch.bool)
            tokens = tokens.where(kept & kept.roll(1, dims=-1), IGNORED)
        return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], 1).to(logits.device)


class ClassifierLoss(LogitsLoss):
    """The loss of a classifier: −log p of the label of each example, or of each token.

    The labels are `labels` of a mapping, or the last tensor of a list or tuple, in the shape of the logits without
    their last dimension; with labels='model' none are needed, and every example counts that a mask of this shape does
    not leave out.
    """

    def targets(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the label of each example, −100 where none counts."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(batch, (list, tuple)) and len(batch) > 1:
            labels = batch[-1]
        if self.labels == "model" and labels is None:
            labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
            mask = mask_of(batch)
            if mask is not None and mask.shape == labels.shape:
                labels = labels.where(mask.cpu().bool(), IGNORED)
        if not torch.is_tensor(labels) or labels.shape != logits.shape[:-1] or labels.is_floating_point():
            given = "none" if labels is None else _described(labels)
            raise UsageError(
                f"labels of the batch: {given}; integers of shape {tuple(logits.shape[:-1])} are needed, as 'labels' "
                "of a mapping or as the last of a tuple"
            )
        return labels.to(logits.device)


class RandomDirections:
    """The loss Σ v · f with v ~ N(0, I) drawn anew for every output f: its G is E[Jᵀ J], J the Jacobian of f.

    The squared distance to the dense model's own outputs has no gradient at the dense model. Its second-order form is
    ½‖J δ‖², which G gives: the increase is half the squared change of f.

    Args:
        function: of a model's output and the batch, returns f of shape (..., d), such as `ks.sentence_embedding`.
        seed: of the directions.
    """

    unit = "half the squared change of the outputs"

    def __init__(self, function: Callable[[Any, Any], torch.Tensor], seed: int = 0):
        self.function, self.name = function, f"RandomDirections({_name_of(function)})"
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Any, batch: Any) -> torch.Tensor:
        """Return Σ v · f."""
        found = self.function(output, batch)
        return (found * torch.randn(found.shape, generator=self._generator).to(found)).sum()

    def count(self, output: Any, batch: Any) -> int:
        """Return the number of outputs f."""
        return self.function(output, batch).shape[:-1].numel()


class FunctionLoss:
    """A plain function of a model's output and the batch as a loss in nats per token that counts."""

    unit = "nats"

    def __init__(self, function: Callable[[Any, Any], torch.Tensor]):
        self.function, self.name = function, _name_of(function)

    def __call__(self, output: Any, batch: Any) -> torch.Tensor:
        """Return the value of the function."""
        return self.function(output, batch)

    def count(self, output: Any, batch: Any) -> int:
        """Return the number of tokens of the batch that count."""
        return num_tokens(batch)


LossLike = Loss | Callable[[Any, Any], torch.Tensor]


def as_loss(loss: LossLike) -> Loss:
    """Return a loss that is given as one, or as a plain function of the output and the batch."""
    return loss if isinstance(loss, Loss) else FunctionLoss(loss)


def checked_loss(loss: Loss, output: Any, batch: Any) -> torch.Tensor:
    """Return the loss of an output.

    Raises:
        UsageError: it is no scalar, or not finite.
    """
    value, name = loss(output, batch), one_line(loss.name)
    if not isinstance(value, torch.Tensor) or value.ndim or not value.is_floating_point():
        raise UsageError(f"the loss {name} is {_described(value)}; one number, summed over all that counts, is needed")
    if not value.isfinite():
        raise UsageError(f"the loss {name} is {value.item()}; a finite one is needed: run the model in float32")
    return value


def tensor_of(output: Any, *names: str) -> torch.Tensor:
    """Return the output of a model, if it is a tensor, or the first of these attributes that it has.

    Raises:
        UsageError: it has none.
    """
    found = next(
        (each for each in (output, *(getattr(output, name, None) for name in names)) if torch.is_tensor(each)), None
    )
    if found is None or found.ndim < 2:
        raise UsageError(
            f"the output of the model is {_described(output)}; a tensor (batch, …, d), or an object with such a "
            f"{' or '.join(names)}, is needed: give a loss of your own"
        )
    return found


def sentence_embedding(output: Any, batch: Any) -> torch.Tensor:
    """Return the mean of the last hidden states over the tokens that count, normalised, shape (batch, d)."""
    states, mask = tensor_of(output, "last_hidden_state"), mask_of(batch)
    kept = states if mask is None else states * mask.to(states).unsqueeze(-1)
    return normalize(kept.sum(1), dim=-1)


def _described(output: Any) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if torch.is_tensor(output) else f"a {type(output).__name__}"


def _name_of(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
