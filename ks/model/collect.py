"""Collect the moments of a model's inputs and gradients, at its linear layers while batches pass through it."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ks.errors import UsageError, one_line
from ks.files.globs import matching, nearest
from ks.files.memory import check_fits
from ks.model.batches import Mask, call, counted, cut, first_tensor, is_held_out, masks_of, on_device_of
from ks.model.hooks import observed
from ks.model.linears import Linear, coverage, linears_of, parameters_of, unwrapped
from ks.model.losses import FunctionLoss, Loss, LossLike, as_loss, checked_loss
from ks.moments.moments_file import InputMoments
from ks.moments.second_moment import VectorSums

_Parts = dict[bool, dict[str, VectorSums]]  # by whether it is held out, and by a name


def collect_input_moments(
    model: torch.nn.Module,
    batches: Iterable[Any],
    layers: str | Sequence[str],
    *,
    loss: LossLike | None = None,
    mask: Mask | None = None,
    held_out: float = 0.2,
    moments: InputMoments | None = None,
    model_name: str | None = None,
    quiet: bool = False,
) -> InputMoments:
    """Sum x xᵀ, x and the number of inputs x of linear layers, in float64, while a model runs on batches.

    With a loss, g gᵀ, g and their number are summed too, of the gradients g = ∂loss/∂y at the outputs y of every layer.

    The model runs in evaluation mode on its own device, without gradients of its parameters. Afterwards no hook is left
    on it, every module has its mode back, and every parameter its `requires_grad` and `.grad`, also after an exception.
    An input tensor of width n takes n² + n float64 numbers on the layer's device, twice with a held-out part; layers
    that receive the same tensor (query, key and value; gate and up) share them. So do the gradients at m outputs, for
    every layer. Products of gradients are in float32, of float64 models in float64.

    Args:
        model: with nn.Linear layers, or Conv1D layers of transformers.
        batches: a batch is a tensor (model(batch)), a list or tuple (model(*batch)) or a mapping (model(**batch)).
        layers: globs over the names of the layers, as in `ks.files.globs.matches`: `encoder.layer.*.output.dense`.
        loss: of the model's output and the batch, summed over all that counts, no mean: `ks.NextTokenLoss()`,
            `ks.ClassifierLoss()`, `ks.RandomDirections(…)`, or a function of both.
        mask: returns the tokens of a batch that count, boolean or integer of shape (batch, tokens), or None for all;
            for a model of several sequences, such functions by globs over the names of layers. By default a mapping's
            `attention_mask` is used. Layers whose inputs it does not fit are left out.
        held_out: fraction of the batches that are held out; every fifth at 0.2.
        moments: of earlier batches, to be continued; it stays as it is. With its number of batches the held-out
            batches are those of an uninterrupted collection.
        model_name: kept with the moments; the class of the model by default.
        quiet: whether to omit the names of the layers on stderr.
    Returns:
        the moments, on the CPU.
    Raises:
        UsageError: no layer matches or none is called, an input or a gradient is not finite, or a mask does not fit its
            layer; the loss is no finite scalar, needs no gradient, gives none to any layer, or is not that of before.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"a held-out fraction of {held_out}: at least 0 and less than 1 is needed")
    model = unwrapped(model)
    known = linears_of(model)
    linears = {name: known[name] for name in matching(known, layers)}
    if not linears:
        wanted = layers if isinstance(layers, str) else ", ".join(layers)
        raise UsageError(f"no nn.Linear or Conv1D of the model matches {one_line(wanted)!r}; {nearest(wanted, known)}")
    loss = None if loss is None else as_loss(loss)
    model_name = model_name or (moments.model if moments else type(model).__name__)
    name, unit = (loss.name, loss.unit) if loss else ("", "")
    earlier = InputMoments({}, {}, {}, {}, model=model_name, loss=name, unit=unit)
    if moments is not None:
        earlier = moments.merge(earlier)  # refuses another model or loss before the first batch
    collection = _Collection(linears, earlier)
    if not quiet:
        lines = [f"{one_line(name)}: {linear.width} wide" for name, linear in linears.items()]
        print(f"inputs of {len(linears)} layers:", *lines, sep="\n", file=sys.stderr)
    gradients = None if loss is None else collection.take_gradient
    with observed(model, linears, collection.take, gradients):
        for batch in batches:
            collection.start_pass(is_held_out(collection.batch, held_out), masks_of(model, batch, mask))
            placed = on_device_of(model, batch)
            output = call(model, placed)
            if loss is not None:
                collection.go_back(loss, model, placed, output)
            collection.check_pass()
        found = collection.result()
    whole = earlier.merge(found)
    if not quiet:
        _report(found, linears, collection.left_out)
        print(f"inputs are known for {coverage(parameters_of(model), {*found.aliases})}", file=sys.stderr)
    return whole


class _Collection:
    """The sums of a collection, filled pass by pass; a pass is one forward call of the model.

    Earlier moments that are continued keep their sharing of inputs.
    """

    def __init__(self, linears: dict[str, Linear], earlier: InputMoments):
        self.linears, self.earlier = linears, earlier
        self.inputs: _Parts = {False: {}, True: {}}  # by the NAME of the input tensor
        self.gradients: _Parts = {False: {}, True: {}}  # by the name of the layer
        self.paused = False
        self.left_out: dict[str, str] = {}  # reasons, by the name of the layer
        self.group: dict[str, str] = {}  # layer → NAME of its input tensor
        self.batch = self.earlier_batches = max(earlier.batches.values(), default=0)
        layer_of = {linear.key: name for name, linear in linears.items()}
        for key, name in earlier.aliases.items():
            if key not in layer_of or name not in linears:
                raise UsageError(
                    f"earlier moments have {one_line(key)!r}, which layers does not match; add it to layers"
                )
            self.group[layer_of[key]] = name

    def start_pass(self, is_held_out: bool, mask_of: Callable[[str], torch.Tensor | None]) -> None:
        self.batch += 1
        self.is_held_out, self.mask_of = is_held_out, mask_of
        self._groups_with: defaultdict[tuple, list[str]] = defaultdict(list)  # that have added an input tensor
        self._received: defaultdict[str, set[tuple]] = defaultdict(set)  # input tensors of a layer
        self._earlier = {*self.group.values()}  # groups with sums of earlier passes

    def take(self, name: str, inputs: torch.Tensor) -> None:
        """Add the inputs of a layer, unless another layer of its group has received the same tensor in this pass."""
        if self.paused or name in self.left_out or not self._fits(name, inputs):
            return
        storage = StorageWeakRef(inputs.untyped_storage())  # kept, so that no later storage is taken for this one
        version = 0 if inputs.is_inference() else inputs._version  # changes when a tensor is modified in place
        tensor = (storage, inputs.storage_offset(), inputs.shape, inputs.stride(), inputs.dtype, version)
        self._received[name].add(tensor)
        groups = self._groups_with[tensor]
        if name not in self.group:
            # A group from an earlier pass has sums that this layer has not seen.
            self.group[name] = groups[0] if groups and groups[0] not in self._earlier else name
        group = self.group[name]
        if group not in groups:
            groups.append(group)
            self._add(self.inputs, group, counted(inputs, self.mask_of(name)), torch.float64)

    def take_gradient(self, name: str, gradients: torch.Tensor) -> None:
        """Add the gradients at the outputs of a layer."""
        if name not in self.left_out:
            dtype = torch.float64 if gradients.dtype == torch.float64 else torch.float32
            self._add(self.gradients, name, counted(gradients, self.mask_of(name)), dtype)

    def _add(self, sums: _Parts, name: str, vectors: torch.Tensor, dtype: torch.dtype) -> None:
        part, width = sums[self.is_held_out], vectors.shape[-1]
        if name not in part:
            device = vectors.device if vectors.device.type != "mps" else torch.device("cpu")  # MPS has no float64
            if device.type == "cpu":
                check_fits(f"the sums of {one_line(name)}", 4 * width * width * 8, "collect fewer layers at a time")
            part[name] = VectorSums.zeros(width, device)
        part[name].add(vectors, dtype)

    def _fits(self, name: str, inputs: torch.Tensor) -> bool:
        """Return whether a mask has one entry for each input of a layer; one that never fitted is left out from now on.

        Raises:
            UsageError: the mask has fitted before.
        """
        mask = self.mask_of(name)
        flattened = mask is not None and inputs.ndim == 2 and len(inputs) == mask.numel()
        if mask is None or inputs.shape[:-1] == mask.shape or flattened:
            return True
        reason = f"its inputs have shape {tuple(inputs.shape)}, and the mask has shape {tuple(mask.shape)}"
        if name in self.group:
            raise UsageError(f"layer {one_line(name)}: {reason} in batch {self.batch}; give another mask")
        self.left_out[name] = f"{reason} (mask= takes masks by globs)"
        return False

    def go_back(self, loss: Loss, model: torch.nn.Module, batch: Any, output: Any) -> None:
        """Run the backward pass from the loss of an output; in the first batch, warn of a function that is a mean."""
        value = checked_loss(loss, output, batch)
        if not value.requires_grad:
            raise UsageError(
                f"the loss {one_line(loss.name)} needs no gradient: it does not depend on the model's parameters by "
                "operations of torch that have one (.item(), .detach() and argmax have none)"
            )
        self.paused = True  # a checkpoint runs its part of the forward pass again
        value.backward()
        if isinstance(loss, FunctionLoss) and self.batch == self.earlier_batches + 1:
            _warn_of_a_mean(loss, model, batch, value.item())
        self.paused = False

    def check_pass(self) -> None:
        """Check that layers with one input tensor have still shared it, and that all vectors were finite."""
        for name, group in self.group.items():
            if self._received[name] != self._received[group]:
                raise UsageError(
                    f"layers {one_line(name)} and {one_line(group)} shared their input at first, but not in batch "
                    f"{self.batch}; collect them one at a time, and merge the moments"
                )
        for what, parts in (("inputs", self.inputs), ("gradients at the outputs", self.gradients)):
            for name, sums in parts[self.is_held_out].items():
                if not sums.sum_x.isfinite().all():
                    raise UsageError(
                        f"the {what} of layer {one_line(name)} hold NaN or infinite values in batch {self.batch}; run "
                        "the model in bfloat16 or float32"
                    )

    def result(self) -> InputMoments:
        """Return the collected moments, on the CPU."""
        if self.batch == self.earlier_batches:
            raise UsageError("no batch was given; at least one is needed")
        train, held_out = _finished(self.inputs)
        gradients, held_out_gradients = (
            {self.linears[name].key: sums for name, sums in part.items()} for part in _finished(self.gradients)
        )
        if not train and self.left_out:
            name, reason = next(iter(self.left_out.items()))
            raise UsageError(f"no layer has inputs that the mask fits; {one_line(name)}: {reason}")
        if not train:
            raise UsageError(
                f"no layer of {one_line(', '.join(self.linears), 300)} was called as a module, so that nothing was "
                "seen (nn.MultiheadAttention uses the weight of its out_proj only)"
            )
        if self.earlier.loss and not gradients:
            raise UsageError(
                f"the loss {one_line(self.earlier.loss)} gives no gradient to any layer of "
                f"{one_line(', '.join(self.linears), 300)}; give layers that it depends on"
            )
        called = {name: group for name, group in self.group.items() if group in train}
        return InputMoments(
            train,
            held_out,
            {self.linears[name].key: group for name, group in called.items()},
            dict.fromkeys(train, self.batch - self.earlier_batches),
            tuple(sorted(self.linears[name].key for name in called if self.linears[name].transposed)),
            self.earlier.model,
            gradients=gradients,
            held_out_gradients=held_out_gradients,
            loss=self.earlier.loss,
            unit=self.earlier.unit,
        )


@torch.no_grad()
def _warn_of_a_mean(loss: Loss, model: torch.nn.Module, batch: Any, whole: float) -> None:
    """Print a warning if the losses of the halves of a batch have the loss of the whole as their mean, not sum."""
    size = len(first_tensor(batch))
    halves = [cut(batch, 0, size // 2), cut(batch, size // 2, size)] if size > 1 else []
    parts = sum(checked_loss(loss, call(model, half), half).item() for half in halves)
    if 0 < whole < 0.75 * parts:
        print(
            f"warning: the loss {one_line(loss.name)} is {whole:.4g} for a batch and {parts:.4g} for its halves "
            "together, as a mean is; return a sum, or the gradients shrink with the size of the batch",
            file=sys.stderr,
        )


def _finished(sums: _Parts) -> tuple[dict[str, VectorSums], dict[str, VectorSums]]:
    """Take the training and the held-out part to the CPU; where all batches were held out, the first one is empty."""
    train, held_out = ({name: part.pop(name).finished() for name in [*part]} for part in (sums[False], sums[True]))
    empty = {name: VectorSums.zeros(each.width) for name, each in held_out.items() if name not in train}
    return train | empty, held_out


def _report(found: InputMoments, linears: dict[str, Linear], reasons: dict[str, str]) -> None:
    """Print how many inputs were summed, and the layers that were left out with the reasons."""
    counts = [max([sums.count for sums in part.values()], default=0) for part in (found.train, found.held_out)]
    print(
        f"{len(found.train)} input tensors of {len(found.aliases)} layers, {max(found.batches.values())} batches: "
        f"{counts[0]} inputs for training, {counts[1]} held out",
        file=sys.stderr,
    )
    for name, linear in linears.items():
        if linear.key not in found.aliases:
            print(f"{one_line(name)}: left out, {reasons.get(name, 'no batch called it')}", file=sys.stderr)
        elif found.loss and linear.key not in found.gradients:
            print(f"{one_line(name)}: inputs alone, because the loss gives it no gradient", file=sys.stderr)
