"""Batches for a model: held out, cut, put on its device, passed through it; and the tokens of them that count."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ks.errors import UsageError, one_line
from ks.files.globs import matches

MaskFunction = Callable[[Any], torch.Tensor | None]
Mask = MaskFunction | Mapping[str, MaskFunction]


def on_device_of(model: torch.nn.Module, batch: Any) -> Any:
    """Return a batch with its tensors on the model's device, apart from any graph and inference mode.

    Parameters on meta are offloaded: a hook brings their values, and moves the inputs, when their module is called.
    """
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        placed = tensor.to(device)
        return placed.clone() if placed.is_inference() else placed.detach()

    return changed(batch, place)


def changed(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a batch with every tensor changed.

    Raises:
        UsageError: no tensor, list, tuple or mapping.
    """

    def each(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) else value

    if isinstance(batch, Mapping):
        return {name: each(value) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [*map(each, batch)]
    if isinstance(batch, torch.Tensor):
        return change(batch)
    raise UsageError(f"a batch of type {type(batch).__name__}: a tensor, list, tuple or mapping is needed")


def is_held_out(index: int, fraction: float) -> bool:
    """Return whether a batch is held out, so that this fraction of all is: every fifth at 0.2."""
    before, after = (math.floor(number * fraction + 1e-9) for number in (index, index + 1))  # 100 · 0.29 is below 29
    return after > before


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """Return the tensors of a batch."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return [value for value in values if isinstance(value, torch.Tensor)]


def first_tensor(batch: Any) -> torch.Tensor:
    """Return the first tensor of a batch that has dimensions; its length is the number of entries of the batch."""
    return next(tensor for tensor in tensors_of(batch) if tensor.ndim)


def cut(batch: Any, start: int, stop: int) -> Any:
    """Return some entries of a batch; tensors of another length than its first one stay whole."""
    size = len(first_tensor(batch))
    return changed(batch, lambda tensor: tensor[start:stop] if tensor.ndim and len(tensor) == size else tensor)


def num_tokens(batch: Any) -> int:
    """Return the number of tokens that count: of the mask, or of the first tensor, of token ids, vectors or images.

    An image, a vector of more than one dimension for each token, counts once.
    """
    mask, first = mask_of(batch), first_tensor(batch)
    if mask is not None:
        return int(mask.bool().sum())
    if not first.is_floating_point():
        return first.numel()
    return first.shape[:-1].numel() if first.ndim <= 3 else len(first)


def call(model: torch.nn.Module, batch: Any) -> Any:
    """Return the output of a model for a batch of `on_device_of`.

    A DataLoader may give (x, labels), or labels in a mapping, to a model of x: of a list the model gets as many parts
    as it takes, of a mapping all but `labels` that it does not take.
    """
    if isinstance(batch, torch.Tensor):
        return model(batch)
    parameters = inspect.signature(model.forward).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if isinstance(batch, dict):
        takes_labels = "labels" in parameters or inspect.Parameter.VAR_KEYWORD in kinds
        return model(**{name: value for name, value in batch.items() if takes_labels or name != "labels"})
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return model(*batch)
    return model(*batch[: sum(kind.name.startswith("POSITIONAL") for kind in kinds)])


def masks_of(model: torch.nn.Module, batch: Any, mask: Mask | None) -> Callable[[str], torch.Tensor | None]:
    """Return a function that returns the tokens of a batch that count for a layer of this name, or None for all.

    Args:
        mask: a function of the batch; functions by globs over the names of layers, of which the first that matches
            counts; or None for a mapping's `attention_mask`.
    Raises:
        UsageError: as `mask_of`; the function, for a layer that no glob matches.
    """
    functions = mask if isinstance(mask, Mapping) else {"**": mask}
    masks = {glob: mask_of(batch, function) for glob, function in functions.items()}
    if mask is None and masks["**"] is not None and (others := _sequences(model, batch, masks["**"])):
        raise UsageError(
            f"the attention_mask is that of one sequence, and the batch has several ({', '.join(others)}); give a "
            'mask for each part of the model, as in mask={"encoder.**": lambda batch: batch["attention_mask"], '
            '"**": lambda batch: None}'
        )

    def of_layer(name: str) -> torch.Tensor | None:
        for glob, found in masks.items():
            if matches(name, glob):
                return found
        raise UsageError(f'no glob of mask= matches layer {one_line(name)}; add "**": lambda batch: None for the rest')

    return of_layer


def _sequences(model: torch.nn.Module, batch: Mapping[str, Any], mask: torch.Tensor) -> list[str]:
    """Return the names of the sequences in a batch if there are several, so that a mask may be that of one of them."""
    of_its_size = [
        name
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
        and value.shape[:2] == mask.shape
        and (value.is_floating_point() or name.endswith("input_ids"))
    ]
    names = list(dict.fromkeys(of_its_size + [name for name in batch if name.startswith("decoder_")]))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return names or ["encoder and decoder"]
    return names if len(names) > 1 else []


def counted(vectors: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the vectors that count, shape (N, n), by a mask with one entry for each."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    return rows if mask is None else rows[mask.flatten().to(rows.device, torch.bool)]


def mask_of(batch: Any, mask: MaskFunction | None = None) -> torch.Tensor | None:
    """Return the tokens of a batch that count, or None for all: by a function, or a mapping's `attention_mask`.

    Raises:
        UsageError: a mask that is neither boolean nor integer.
    """
    of_batch = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    found = mask(batch) if mask is not None else of_batch
    if found is not None and (found.is_floating_point() or found.is_complex()):
        raise UsageError(
            f"a mask of dtype {found.dtype}: a boolean or integer one is needed, true where a token counts"
        )
    return found
