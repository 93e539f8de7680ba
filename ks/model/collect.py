"""Collect the moments of a model's inputs, by hooks on its linear layers while batches pass through it."""

import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ks.errors import UsageError, one_line
from ks.files.globs import matching, nearest
from ks.files.memory import check_fits
from ks.model.linears import Linear, linears_of, unwrapped
from ks.moments.moments_file import InputMoments
from ks.moments.second_moment import VectorSums


def collect_input_moments(
    model: torch.nn.Module,
    batches: Iterable[Any],
    layers: str | Sequence[str],
    *,
    mask: Callable[[Any], torch.Tensor | None] | None = None,
    held_out: float = 0.2,
    moments: InputMoments | None = None,
    model_name: str | None = None,
    quiet: bool = False,
) -> InputMoments:
    """Sum x xᵀ, x and the number of inputs x of linear layers, in float64, while a model runs on batches.

    The model runs in evaluation mode and without gradients on its own device. Afterwards no hook is left on it and
    every module has its mode back, also after an exception. An input tensor of width n takes n² + n float64 numbers on
    the layer's device, twice with a held-out part; layers that receive the same tensor (query, key and value; gate and
    up) share them.

    Args:
        model: with nn.Linear layers, or Conv1D layers of transformers.
        batches: a batch is a tensor (model(batch)), a list or tuple (model(*batch)) or a mapping (model(**batch)).
        layers: globs over the names of the layers, as in `ks.files.globs.matches`: `encoder.layer.*.output.dense`.
        mask: returns the tokens of a batch that count, boolean or integer of shape (batch, tokens), or None for all.
            By default a mapping's `attention_mask` is used.
        held_out: fraction of the batches that are held out; every fifth at 0.2.
        moments: of earlier batches, to be continued; it stays as it is. With its number of batches the held-out
            batches are those of an uninterrupted collection.
        model_name: kept with the moments; the class of the model by default.
        quiet: whether to omit the names of the layers on stderr.
    Returns:
        the moments, on the CPU.
    Raises:
        UsageError: no layer matches or none is called, an input is not finite, or a mask does not fit its layer.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"a held-out fraction of {held_out}: at least 0 and less than 1 is needed")
    model = unwrapped(model)
    linears = _matching_linears(model, layers)
    collection = _Collection(linears, moments, model_name or (moments.model if moments else type(model).__name__))
    if not quiet:
        lines = [f"{one_line(name)}: {linear.width} wide" for name, linear in linears.items()]
        print(f"inputs of {len(linears)} layers:", *lines, sep="\n", file=sys.stderr)
    with _observed(model, linears, collection.take):
        for batch in batches:
            before = collection.batch
            # 1e-9, because 100 · 0.29 falls below 29
            is_held_out = math.floor((before + 1) * held_out + 1e-9) > math.floor(before * held_out + 1e-9)
            collection.start_pass(is_held_out, _mask_of(batch, mask))
            _run(model, batch)
            collection.check_pass()
        found = collection.result()
        whole = found if moments is None else moments.merge(found)
    if not quiet:
        _report(found, linears)
    return whole


def _matching_linears(model: torch.nn.Module, layers: str | Sequence[str]) -> dict[str, Linear]:
    linears = linears_of(model)
    if matched := matching(linears, layers):
        return {name: linears[name] for name in matched}
    wanted = layers if isinstance(layers, str) else ", ".join(layers)
    raise UsageError(f"no nn.Linear or Conv1D of the model matches {one_line(wanted)!r}; {nearest(wanted, linears)}")


class _Collection:
    """The sums of a collection, filled pass by pass; a pass is one forward call of the model.

    Earlier moments that are continued keep their sharing of inputs.
    """

    def __init__(self, linears: dict[str, Linear], earlier: InputMoments | None, model_name: str):
        self.linears, self.model_name = linears, model_name
        self.sums: dict[bool, dict[str, VectorSums]] = {False: {}, True: {}}  # by whether it is held out
        self.group: dict[str, str] = {}  # layer → NAME of its input tensor
        self.batch = self.earlier_batches = max(earlier.batches.values()) if earlier else 0
        if earlier and earlier.model != model_name:
            names = f"{one_line(earlier.model)!r}, not {one_line(model_name)!r}"
            raise UsageError(f"earlier moments are of model {names}; start anew")
        layer_of = {linear.key: name for name, linear in linears.items()}
        for key, name in earlier.aliases.items() if earlier else ():
            if key not in layer_of or name not in linears:
                raise UsageError(
                    f"earlier moments have {one_line(key)!r}, which layers does not match; add it to layers"
                )
            self.group[layer_of[key]] = name

    def start_pass(self, is_held_out: bool, mask: torch.Tensor | None) -> None:
        self.batch += 1
        self.is_held_out, self.mask = is_held_out, mask
        self._met: dict[tuple, str] = {}  # input tensor → NAME
        self._alive: list[StorageWeakRef] = []  # so that no storage of this pass is taken for a later one
        self._received: defaultdict[str, set[tuple]] = defaultdict(set)
        self._earlier = {*self.group.values()}  # groups with sums of earlier passes
        self._added: set[tuple] = set()

    def take(self, name: str, inputs: torch.Tensor) -> None:
        """Add the inputs of a layer, unless another layer of its group has received the same tensor in this pass."""
        storage = StorageWeakRef(inputs.untyped_storage())
        self._alive.append(storage)
        version = 0 if inputs.is_inference() else inputs._version  # changes when a tensor is modified in place
        tensor = (storage.cdata, inputs.storage_offset(), inputs.shape, inputs.stride(), inputs.dtype, version)
        self._received[name].add(tensor)
        if name not in self.group:
            # A group from an earlier pass has sums that this layer has not seen.
            shared = self._met.get(tensor, name)
            self.group[name] = name if shared in self._earlier else shared
        group = self.group[name]
        self._met.setdefault(tensor, group)
        if (group, tensor) not in self._added:
            self._added.add((group, tensor))
            self._add(group, name, inputs)

    def _add(self, group: str, name: str, inputs: torch.Tensor) -> None:
        part, width = self.sums[self.is_held_out], self.linears[name].width
        if group not in part:
            device = inputs.device if inputs.device.type != "mps" else torch.device("cpu")  # MPS has no float64
            if device.type == "cpu":
                check_fits(f"the sums of {one_line(name)}", 4 * width * width * 8, "collect fewer layers at a time")
            part[group] = VectorSums.zeros(width, device)
        part[group].add(self._tokens(name, inputs))

    def _tokens(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs that count, shape (N, n)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.mask is None:
            return rows
        flattened = inputs.ndim == 2 and len(inputs) == self.mask.numel()
        if inputs.shape[:-1] != self.mask.shape and not flattened:
            raise UsageError(
                f"layer {one_line(name)} receives inputs of shape {tuple(inputs.shape)}, the mask has shape "
                f"{tuple(self.mask.shape)}; it must have one entry per input: give another mask, or leave the layer out"
            )
        return rows[self.mask.flatten().to(inputs.device, torch.bool)]

    def check_pass(self) -> None:
        """Check that layers with one input tensor have still shared it, and that all inputs were finite."""
        for name, group in self.group.items():
            if self._received[name] != self._received[group]:
                raise UsageError(
                    f"layers {one_line(name)} and {one_line(group)} shared their input at first, but not in batch "
                    f"{self.batch}; collect them one at a time, and merge the moments"
                )
        for name, sums in self.sums[self.is_held_out].items():
            if not sums.sum_x.isfinite().all():
                raise UsageError(
                    f"the inputs of layer {one_line(name)} hold NaN or infinite values in batch {self.batch}; run the "
                    "model in bfloat16 or float32"
                )

    def result(self) -> InputMoments:
        """Return the collected moments, on the CPU."""
        if self.batch == self.earlier_batches:
            raise UsageError("no batch was given; at least one is needed")
        train, held_out = (
            {name: sums.finished() for name, sums in self.sums[is_held_out].items()} for is_held_out in (False, True)
        )
        if not train and not held_out:
            raise UsageError(
                f"no layer of {one_line(', '.join(self.linears), 300)} was called as a module, so that nothing was "
                "seen (nn.MultiheadAttention uses the weight of its out_proj only)"
            )
        for name, sums in held_out.items():  # all its batches were held out
            train.setdefault(name, VectorSums.zeros(sums.width))
        called = {name: group for name, group in self.group.items() if group in train}
        return InputMoments(
            train,
            held_out,
            {self.linears[name].key: group for name, group in called.items()},
            dict.fromkeys(train, self.batch - self.earlier_batches),
            tuple(sorted(self.linears[name].key for name in called if self.linears[name].transposed)),
            self.model_name,
        )


@contextlib.contextmanager
def _observed(
    model: torch.nn.Module, linears: dict[str, Linear], take: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Hook the layers and put the model into evaluation mode without gradients; undo all of it at the end."""

    def hook(name: str, module: torch.nn.Module, positional: tuple, named: dict) -> None:
        take(name, (positional[0] if positional else next(iter(named.values()))).detach())

    with contextlib.ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for name, linear in linears.items():
            undo.callback(linear.module.register_forward_pre_hook(partial(hook, name), with_kwargs=True).remove)
        model.eval()
        if "torch._dynamo" in sys.modules:  # a compiled part runs without the hooks that came after its compilation
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        with torch.inference_mode(False), torch.no_grad():
            yield


def _run(model: torch.nn.Module, batch: Any) -> None:
    """Call the model on a batch, whose tensors are moved to the model's device.

    Parameters on meta are offloaded: a hook brings their values, and moves the inputs, when their module is called.
    """
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)

    def place(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    if isinstance(batch, Mapping):
        model(**{name: place(value) for name, value in batch.items()})
    elif isinstance(batch, (list, tuple)):
        model(*map(place, batch))
    elif isinstance(batch, torch.Tensor):
        model(place(batch))
    else:
        raise UsageError(f"a batch of type {type(batch).__name__}: a tensor, list, tuple or mapping is needed")


def _mask_of(batch: Any, mask: Callable[[Any], torch.Tensor | None] | None) -> torch.Tensor | None:
    of_batch = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    found = mask(batch) if mask is not None else of_batch
    if found is not None and (found.is_floating_point() or found.is_complex()):
        raise UsageError(
            f"a mask of dtype {found.dtype}: a boolean or integer one is needed, true where a token counts"
        )
    return found


def _report(found: InputMoments, linears: dict[str, Linear]) -> None:
    """Print how many inputs were summed, and the layers that were not called."""
    counts = [max([sums.count for sums in part.values()], default=0) for part in (found.train, found.held_out)]
    print(
        f"{len(found.train)} input tensors of {len(found.aliases)} layers, {max(found.batches.values())} batches: "
        f"{counts[0]} inputs for training, {counts[1]} held out",
        file=sys.stderr,
    )
    for name, linear in linears.items():
        if linear.key not in found.aliases:
            print(f"{one_line(name)}: left out, because no batch called it", file=sys.stderr)
