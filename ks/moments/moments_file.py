"""Moments of the inputs of a model's layers: merged, and kept in a .safetensors file."""

import json
import platform
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch

from ks.errors import UsageError, one_line
from ks.files.atomic import write_safetensors
from ks.files.globs import nearest
from ks.files.memory import check_fits
from ks.files.provenance import now
from ks.files.schema import InputMomentsRecord
from ks.moments.sums import InputSums

METADATA = "ks_input_moments"  # the entry of the file's metadata, as JSON
VERSION = 1
HELD_OUT = "held_out/"
TENSORS = ("sum_xx", "sum_x", "count")


@dataclass(frozen=True)
class InputMoments:
    """Sums over the inputs of a model's layers, for training and held out.

    An input tensor has the NAME of the first layer that received it; layers that share it share its sums.

    Args:
        train: the sums of every input tensor, by NAME.
        held_out: the same over held-out inputs; a NAME without any is missing.
        aliases: NAME of the input of every weight, by the weight's key in a checkpoint.
        batches: number of batches, by NAME.
        transposed: keys of the weights that are stored as (in, out).
        model: name of the model.
    """

    train: dict[str, InputSums]
    held_out: dict[str, InputSums]
    aliases: dict[str, str]
    batches: dict[str, int]
    transposed: tuple[str, ...] = ()
    model: str = ""

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
        name = self.aliases[find_weight(self.aliases, key, "these moments")]
        part = (self.held_out if held_out else self.train).get(name)
        if part is None or part.count == 0:
            raise UsageError(f"inputs {one_line(name)!r} have no {'held-out' if held_out else 'training'} part")
        return part.sum_xx / part.count

    def merge(self, other: "InputMoments") -> "InputMoments":
        """Return the moments over the inputs of both; layers that only one of them has are kept.

        Args:
            other: of the same model, from other batches or of other layers.
        Raises:
            UsageError: another model, or a layer with another width or another shared input.
        """
        if self.model != other.model:
            raise UsageError(
                f"moments of model {one_line(self.model)!r} and of {one_line(other.model)!r} are not to be merged; "
                "give one model_name when you collect both"
            )
        for key in self.aliases.keys() & other.aliases.keys():
            if self.aliases[key] != other.aliases[key]:
                raise UsageError(
                    f"weight {one_line(key)!r} has inputs {one_line(self.aliases[key])!r} in one of the moments and "
                    f"{one_line(other.aliases[key])!r} in the other; collect both with the same layers"
                )
        return InputMoments(
            _added(self.train, other.train),
            _added(self.held_out, other.held_out),
            self.aliases | other.aliases,
            {
                name: self.batches.get(name, 0) + other.batches.get(name, 0)
                for name in [*self.batches, *(name for name in other.batches if name not in self.batches)]
            },
            tuple(sorted({*self.transposed, *other.transposed})),
            self.model,
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
        """Return tensors and metadata of the file."""
        tensors: dict[str, torch.Tensor] = {}
        for prefix, part in (("", self.train), (HELD_OUT, self.held_out)):
            for name, sums in part.items():
                values = (sums.sum_xx, sums.sum_x, torch.tensor(sums.count))
                tensors |= {f"{name}/{prefix}{label}": value for label, value in zip(TENSORS, values)}
        record = InputMomentsRecord(
            VERSION, self.aliases, self.batches, now(), list(self.transposed), self.model, _libraries()
        )
        return tensors, {METADATA: json.dumps(msgspec.to_builtins(record))}

    @classmethod
    def load(cls, path) -> "InputMoments":
        """Read what `save` wrote.

        Raises:
            UsageError: the file is missing, damaged, of a newer version, holds invalid sums or exceeds the memory.
        """
        file = MomentsFile(path)
        return file.moments(file.record.aliases)


def _added(first: Mapping[str, InputSums], second: Mapping[str, InputSums]) -> dict[str, InputSums]:
    """Return the sums of both, by name."""
    added = {**second, **first}
    for name in first.keys() & second.keys():
        widths = first[name].width, second[name].width
        if widths[0] != widths[1]:
            raise UsageError(
                f"inputs {one_line(name)!r} are {widths[0]} wide in one of the moments and {widths[1]} in the other"
            )
        added[name] = first[name].plus(second[name])
    return added


def _libraries() -> dict[str, str]:
    """Return the versions of what makes the inputs, as far as it is loaded."""
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("ks", "torch", "transformers")}
    return {"python": platform.python_version(), **{name: str(version) for name, version in loaded.items() if version}}


def find_weight(known_keys: Collection[str], key: str, where: str, what: str = "inputs") -> str:
    """Return the key of a weight as a file of moments, or a model, spells it.

    Exact keys come first, then names of layers, then the one key that differs by a prefix of one or two components,
    as `bert.encoder.layer.0.output.dense.weight` does from `encoder.layer.0.output.dense.weight`.

    Args:
        known_keys: keys of weights.
        key: of the weight in its checkpoint, or the name of its layer.
        where: the file or the model, for messages.
        what: is looked for, for messages.
    Raises:
        UsageError: no key fits, or several do.
    """
    for spelling in (key, f"{key}.weight"):
        if spelling in known_keys:
            return spelling
    behind_prefix = [known for known in known_keys if _differ_by_prefix(known, key)]
    if len(behind_prefix) == 1:
        return behind_prefix[0]
    if behind_prefix:
        fitting = one_line(", ".join(behind_prefix), 300)
        raise UsageError(f"{where}: key {one_line(key)!r} fits {fitting}; give one of them in full")
    raise UsageError(f"{where}: no {what} for key {one_line(key)!r}; {nearest(key, known_keys)}")


def open_safetensors(path: Path, what: str) -> tuple[Any, dict[str, str]]:
    """Return an open .safetensors file and its metadata.

    Args:
        path: of the file.
        what: it should hold, for the message.
    Raises:
        UsageError: no regular file, or a damaged one.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file" if not path.exists() else f"{path} is not a regular file")
    try:
        file = safetensors.safe_open(path, framework="pt", device="cpu")
        return file, file.metadata() or {}
    except Exception as error:  # a damaged file can raise nearly anything
        raise UsageError(f"{path} cannot be read as {what} ({one_line(error, 160)})") from error


def _differ_by_prefix(one: str, other: str) -> bool:
    """Return whether one name is the other with one or two components before it."""
    shorter, longer = sorted((one, other), key=len)
    return "." in shorter and longer.endswith(f".{shorter}") and longer.removesuffix(f".{shorter}").count(".") < 2


class MomentsFile:
    """A moments file: its metadata are read and checked at once, sums on request.

    Args:
        path: of the file.
    Raises:
        UsageError: it is no valid moments file.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._file, metadata = open_safetensors(self.path, "moments of inputs")
        if METADATA not in metadata:
            raise UsageError(
                f"{self.path} holds no moments of inputs; ks.collect_input_moments(…).save(path) makes some"
            )
        try:
            self.record = msgspec.json.decode(metadata[METADATA], type=InputMomentsRecord)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise UsageError(f"{self.path} has invalid metadata: {one_line(error, 200)}") from error
        if self.record.version > VERSION:
            raise UsageError(f"{self.path} has version {self.record.version}; {VERSION} is the newest known, update ks")
        self._names = set(self._file.keys())

    def width(self, name: str, prefix: str = "") -> int | None:
        """Return n of an input tensor, or None if the file has no sums of it.

        Args:
            name: NAME of the input tensor.
            prefix: '', or `HELD_OUT`.
        Raises:
            UsageError: some of sum_xx, sum_x and count are missing, or sum_xx is not square.
        """
        missing = [label for label in TENSORS if f"{name}/{prefix}{label}" not in self._names]
        if len(missing) == len(TENSORS):
            return None
        if missing:
            raise UsageError(f"{self._where(name, prefix)}: {', '.join(missing)} missing; collect the moments again")
        shape = self._file.get_slice(f"{name}/{prefix}sum_xx").get_shape()
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise UsageError(f"{self._where(name, prefix)}: sum_xx has shape {tuple(shape)}; a square one is needed")
        return shape[0]

    def sums(self, name: str, prefix: str = "") -> InputSums | None:
        """Return the sums of an input tensor, or None if the file lacks all three.

        Args:
            name: NAME of the input tensor.
            prefix: '', or `HELD_OUT`.
        Raises:
            UsageError: as `width`; another shape or dtype; NaN or infinite values; or more than the memory.
        """
        if (width := self.width(name, prefix)) is None:
            return None
        where = self._where(name, prefix)
        check_fits(where, 5 * width * width * 8, "use a machine with more memory")  # with what the checks need
        try:
            square, sum_x, count = (self._file.get_tensor(f"{name}/{prefix}{label}") for label in TENSORS)
        except Exception as error:  # SafetensorError, or torch has no such dtype
            raise UsageError(f"{where} cannot be read ({one_line(error, 160)})") from error
        if sum_x.shape != (width,):
            raise UsageError(f"{where}: sum_x has shape {tuple(sum_x.shape)}; ({width},) is needed")
        if not (square.is_floating_point() and sum_x.is_floating_point()):
            raise UsageError(f"{where}: sums of dtype {square.dtype} and {sum_x.dtype}; floating ones are needed")
        if count.numel() != 1 or count.dtype != torch.int64 or count.item() < 0:
            raise UsageError(f"{where}: count must be one integer of at least 0, int64")
        square, sum_x = square.double(), sum_x.double()
        if not (square.isfinite().all() and sum_x.isfinite().all()):
            raise UsageError(f"{where} holds NaN or infinite sums; collect the moments again")
        return InputSums(square, sum_x, int(count.item()))

    def moments(self, aliases: Mapping[str, str]) -> InputMoments:
        """Return the moments of some weights.

        Args:
            aliases: those of the record, or some of them.
        Raises:
            UsageError: as `sums`, or the sums of a weight are missing.
        """
        names = list(dict.fromkeys(aliases.values()))
        train, held_out = ({name: self.sums(name, prefix) for name in names} for prefix in ("", HELD_OUT))
        for name, sums in train.items():
            if sums is None:
                raise UsageError(f"{self._where(name, '')}: {', '.join(TENSORS)} missing; collect the moments again")
        return InputMoments(
            {name: sums for name, sums in train.items() if sums is not None},
            {name: sums for name, sums in held_out.items() if sums is not None},
            dict(aliases),
            {name: self.record.batches.get(name, 0) for name in names},
            tuple(key for key in self.record.transposed if key in aliases),
            self.record.model,
        )

    def _where(self, name: str, prefix: str) -> str:
        return f"{self.path}, inputs {one_line(f'{name}/{prefix}').rstrip('/')!r}"
