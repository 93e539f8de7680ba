"""Moments of the inputs of a model's layers, and of the gradients at their outputs: merged, saved and read."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors
import safetensors.torch
import torch

from ks.errors import UsageError, one_line
from ks.files.atomic import write_safetensors
from ks.files.globs import find_weight, nearest
from ks.files.memory import check_fits
from ks.files.provenance import now
from ks.files.schema import Count, Positive, Text
from ks.files.weights import entries_of, read_entry, shape_of
from ks.moments.second_moment import VectorSums

METADATA = "ks_input_moments"  # the entry of the file's metadata, as JSON
MOMENTS_VERSION = 2  # 1 for moments without gradients
HELD_OUT, GRADIENTS = "held_out/", "gradients/"
# The prefix that each kind of sums has in the file.
PARTS = {"train": "", "held_out": HELD_OUT, "gradients": GRADIENTS, "held_out_gradients": GRADIENTS + HELD_OUT}
SUM_LABELS = ("sum_xx", "sum_x", "count")


class _Metadata(msgspec.Struct):
    """The JSON in the metadata of the file; `InputMoments` describes the fields."""

    version: Positive
    aliases: Annotated[dict[Text, Text], msgspec.Meta(min_length=1)]
    batches: dict[Text, Count]
    created: Text
    transposed: list[Text] = msgspec.field(default_factory=list)
    model: Text = ""
    gradients: list[Text] = msgspec.field(default_factory=list)
    loss: Text = ""
    unit: Text = ""


@dataclass(frozen=True)
class InputMoments:
    """Sums over the inputs of a model's layers, for training and held out.

    An input tensor has the NAME of the first layer that received it; layers that receive the same tensor have one sum.
    The gradients of a loss at the outputs of every layer are its own, and there are none unless a loss was given.

    Args:
        train: the sums of every input tensor, by NAME.
        held_out: the same over held-out inputs; a NAME without any is missing.
        aliases: NAME of the input of every weight, by the weight's key in a checkpoint.
        batches: number of batches, by NAME.
        transposed: keys of the weights that are stored as (in, out).
        model: name of the model.
        source: their file, for messages.
        gradients: the sums of g = ∂loss/∂y over the tokens of `train`, by the key of the weight.
        held_out_gradients: likewise, over held-out tokens.
        loss: name of that loss.
        unit: of the loss, such as `nats`.
    """

    train: Mapping[str, VectorSums]
    held_out: Mapping[str, VectorSums]
    aliases: dict[str, str]
    batches: dict[str, int]
    transposed: tuple[str, ...] = ()
    model: str = ""
    source: str = "these moments"
    gradients: Mapping[str, VectorSums] = field(default_factory=dict)
    held_out_gradients: Mapping[str, VectorSums] = field(default_factory=dict)
    loss: str = ""
    unit: str = ""

    def __repr__(self) -> str:
        """Return one line: how many layers, how many samples the first of them has, and whose gradients."""
        first = next(iter(self.train), "")  # of an open file, each costs a matrix to read
        samples, held_out = (part[first].count if first in part else 0 for part in (self.train, self.held_out))
        of = f"gradients of {one_line(self.loss)}" if self.gradients else "no gradients"
        return f"InputMoments(layers: {len(self.aliases)}, samples: {samples:,}, held out: {held_out:,}, {of})"

    def key_of(self, key: str | None) -> str:
        """Return the key of a weight as these moments spell it.

        Args:
            key: of the weight in its checkpoint, or the name of its layer; None if there is one weight alone.
        Raises:
            UsageError: no key fits, or several do.
        """
        if key is not None:
            return find_weight(self.aliases, key, self.source)
        if len(self.aliases) > 1:
            count = len(self.aliases)
            raise UsageError(
                f"{self.source} holds the inputs of {count} weights; give a key, {nearest('', self.aliases)}"
            )
        return next(iter(self.aliases))

    def only(self, key: str | None) -> "InputMoments":
        """Return the moments of one weight alone, in memory; the key is that of `key_of`."""
        found = self.key_of(key)
        name = self.aliases[found]
        alone: dict[str, Any] = {}
        for part, prefix in PARTS.items():
            sums, own = getattr(self, part), found if GRADIENTS in prefix else name
            alone[part] = {own: sums[own]} if own in sums else {}
        batches, transposed = {name: self.batches.get(name, 0)}, (found,) if found in self.transposed else ()
        return dataclasses.replace(self, **alone, aliases={found: name}, batches=batches, transposed=transposed)

    def second_moment(self, key: str, held_out: bool = False) -> torch.Tensor:
        """Return C = Σ x xᵀ / N for a weight.

        Args:
            key: of the weight in a checkpoint.
            held_out: whether to use the held-out inputs.
        Returns:
            float64, shape (n, n).
        Raises:
            UsageError: the key or the part is missing.
        """
        name = self.aliases[self.key_of(key)]
        part = (self.held_out if held_out else self.train).get(name)
        if part is None or part.count == 0:
            raise UsageError(f"inputs {one_line(name)!r} have no {'held-out' if held_out else 'training'} part")
        return part.second_moment

    def merge(self, other: "InputMoments") -> "InputMoments":
        """Return the moments over the inputs of both; layers that only one of them has are kept.

        Args:
            other: of the same model, from other batches or of other layers.
        Raises:
            UsageError: another model or loss, or a layer with another width or another shared input, or with gradients
                in one of them only.
        """
        if self.model != other.model:
            raise UsageError(
                f"moments of model {one_line(self.model)!r} and of {one_line(other.model)!r} are not to be merged; "
                "give one model_name when you collect both"
            )
        if self.loss != other.loss:
            raise UsageError(
                f"moments with gradients of {one_line(self.loss or 'no loss')!r} and of "
                f"{one_line(other.loss or 'no loss')!r} are not to be merged; collect both with one loss"
            )
        for key in self.aliases.keys() & other.aliases.keys():
            if self.aliases[key] != other.aliases[key]:
                raise UsageError(
                    f"weight {one_line(key)!r} has inputs {one_line(self.aliases[key])!r} in one of the moments and "
                    f"{one_line(other.aliases[key])!r} in the other; collect both with the same layers"
                )
            if (key in self.gradients) != (key in other.gradients):
                raise UsageError(
                    f"weight {one_line(key)!r} has gradients in one of the moments only; collect both with one loss"
                )
        sums: dict[str, Any] = {
            part: _added(getattr(self, part), getattr(other, part), "gradients of" if GRADIENTS in prefix else "inputs")
            for part, prefix in PARTS.items()
        }
        batches = Counter(self.batches)
        batches.update(other.batches)
        return InputMoments(
            **sums,
            aliases=self.aliases | other.aliases,
            batches=dict(batches),
            transposed=tuple(sorted({*self.transposed, *other.transposed})),
            model=self.model,
            loss=self.loss,
            unit=self.unit,
        )

    def save(self, path) -> None:
        """Write a .safetensors file atomically; docs/inputs.md has its format.

        Args:
            path: with the suffix .safetensors.
        Raises:
            UsageError: another suffix, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise UsageError(f"{path}: moments of inputs are kept in a .safetensors file; give it that suffix")
        try:
            write_safetensors(path, *self._content())
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({one_line(error, 200)})") from error

    def packed(self) -> bytes:
        """Return the content of the file that `save` writes."""
        return safetensors.torch.save(*self._content())

    def _content(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        tensors: dict[str, torch.Tensor] = {}
        for part, prefix in PARTS.items():
            for name, sums in getattr(self, part).items():
                values = (sums.sum_xx, sums.sum_x, torch.tensor(sums.count))
                tensors |= {f"{name}/{prefix}{label}": value for label, value in zip(SUM_LABELS, values)}
        record = _Metadata(
            MOMENTS_VERSION if self.loss else 1,
            self.aliases,
            self.batches,
            now(),
            list(self.transposed),
            self.model,
            list(self.gradients),
            self.loss,
            self.unit,
        )
        return tensors, {METADATA: json.dumps(msgspec.to_builtins(record))}

    @classmethod
    def load(cls, path) -> "InputMoments":
        """Read a file that `save` wrote.

        Raises:
            UsageError: the file is missing, damaged, of a newer version, holds invalid sums or exceeds the memory.
        """
        stored = cls.open(path)
        in_memory: dict[str, Any] = {part: dict(getattr(stored, part)) for part in PARTS}
        return dataclasses.replace(stored, **in_memory)

    @classmethod
    def open(cls, path) -> "InputMoments":
        """Return the moments of a file whose sums are read, and checked, each time that they are asked for.

        Raises:
            UsageError: it is no valid file of moments.
        """
        entries, text = entries_of(Path(path), "moments of inputs"), moments_metadata(Path(path))
        if text is None:
            raise UsageError(f"{path} holds no moments of inputs; ks.collect_input_moments(…).save(path) makes some")
        try:
            record = msgspec.json.decode(text, type=_Metadata)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise UsageError(f"{path} has invalid metadata: {one_line(error, 200)}") from error
        if record.version > MOMENTS_VERSION:
            raise UsageError(f"{path} has version {record.version}; {MOMENTS_VERSION} is the newest known, update ks")
        names = list(dict.fromkeys(record.aliases.values()))
        sums: dict[str, Any] = {}
        for part, prefix in PARTS.items():
            kept = record.gradients if GRADIENTS in prefix else names
            if HELD_OUT in prefix:
                kept = [name for name in kept if any(f"{name}/{prefix}{each}" in entries for each in SUM_LABELS)]
            sums[part] = _StoredSums(entries, str(path), kept, prefix)
        return cls(
            **sums,
            aliases=record.aliases,
            batches={name: record.batches.get(name, 0) for name in names},
            transposed=tuple(record.transposed),
            model=record.model,
            source=str(path),
            loss=record.loss,
            unit=record.unit,
        )


def as_moments(moments: InputMoments | str | Path | None) -> InputMoments | None:
    """Return moments that are given in memory, in a file, or not at all."""
    return moments if moments is None or isinstance(moments, InputMoments) else InputMoments.open(moments)


class _StoredSums(Mapping[str, VectorSums]):
    """The sums of one part of an open file, by NAME; they are read and checked when one is asked for."""

    def __init__(self, entries: dict, path: str, names: list[str], prefix: str):
        self._entries, self._path, self._names, self._prefix = entries, path, names, prefix

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> VectorSums:
        """Return the sums of an input tensor.

        Raises:
            UsageError: a tensor is missing, or has another shape or dtype; NaN or infinite values; or more than the
                memory.
        """
        if name not in self._names:
            raise KeyError(name)
        entries = {label: self._entries.get(f"{name}/{self._prefix}{label}") for label in SUM_LABELS}
        what = "gradients" if self._prefix.startswith(GRADIENTS) else "inputs"
        shown = f"{name}/{self._prefix.removeprefix(GRADIENTS)}".rstrip("/")
        where = f"{self._path}, {what} {one_line(shown)!r}"
        if missing := [label for label, entry in entries.items() if entry is None]:
            raise UsageError(f"{where}: the file lacks {', '.join(missing)}; collect the moments again")
        shape = shape_of(entries["sum_xx"])
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise UsageError(f"{where}: sum_xx has shape {shape}; a square one is needed")
        width = shape[0]
        check_fits(where, 5 * width * width * 8, "use a machine with more memory")  # the checks copy it
        square, sum_x, count = (read_entry(entry, where) for entry in entries.values())
        if sum_x.shape != (width,):
            raise UsageError(f"{where}: sum_x has shape {tuple(sum_x.shape)}; ({width},) is needed")
        if not (square.is_floating_point() and sum_x.is_floating_point()):
            raise UsageError(f"{where}: sums of dtype {square.dtype} and {sum_x.dtype}; floating ones are needed")
        if count.numel() != 1 or count.dtype != torch.int64 or count.item() < 0:
            raise UsageError(f"{where}: count must be one integer of at least 0, int64")
        square, sum_x = square.double(), sum_x.double()
        if not (square.isfinite().all() and sum_x.isfinite().all()):
            raise UsageError(f"{where} holds NaN or infinite sums; collect the moments again")
        return VectorSums(square, sum_x, int(count.item()))


def _added(first: Mapping[str, VectorSums], second: Mapping[str, VectorSums], what: str) -> dict[str, VectorSums]:
    """Return the sums of both, by name."""
    added = {**second, **first}
    for name in first.keys() & second.keys():
        widths = first[name].width, second[name].width
        if widths[0] != widths[1]:
            raise UsageError(
                f"{what} {one_line(name)!r} are {widths[0]} wide in one of the moments and {widths[1]} in the other"
            )
        added[name] = first[name].plus(second[name])
    return added


def moments_metadata(path: Path) -> str | None:
    """Return the JSON in a file of moments, None for another file; `entries_of` has opened the file before."""
    if path.suffix.lower() != ".safetensors":
        return None
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return (file.metadata() or {}).get(METADATA)
