"""Compressed models in folders: all tensors as .safetensors, the chains as JSON, no pickle."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import safetensors
import torch
from torch import nn

from ks import signals
from ks.chain.patterns import check_patterns
from ks.chain.product import blocks_of
from ks.errors import UsageError, one_line
from ks.files.atomic import write_json, write_safetensors
from ks.files.globs import nearest
from ks.files.memory import check_fits
from ks.files.provenance import now
from ks.files.schema import CompressedLayer, CompressedModel, read_json_as
from ks.layer import KSLinear
from ks.model.linears import checkpoint_name, linears_of, replace_modules, unwrapped

TENSORS_FILE, RECORD_FILE = "model.safetensors", "compressed.json"
MODEL_FORMAT, MODEL_VERSION = "ks_compressed_model", 2


def save_compressed(model: nn.Module, folder, *, densify: bool = False) -> None:
    """Write a model with chains to a folder: model.safetensors with all its tensors, compressed.json with its chains.

    The folder is written beside its place and then renamed, so that it is complete or absent. One that this function
    wrote earlier is replaced.

    Args:
        model: with `KSLinear` layers; `ks.compress` makes one. Tensors that are tied are stored once.
        folder: new, empty, or of an earlier call.
        densify: write an ordinary checkpoint instead, for programs that know no chains: every chain is multiplied out
            into a dense weight under the name that it had, and tied tensors are stored under each of their names.
    Raises:
        UsageError: the folder holds something else or cannot be written, or the model has state that is no tensor.
    """
    folder = Path(folder).absolute()
    _check_folder(folder)
    model = unwrapped(model)
    chains = {checkpoint_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    chains = {name: module for name, module in chains.items() if isinstance(module, KSLinear)}
    state = _densified(_state_of(model), chains) if densify else _state_of(model)
    aliases = {} if densify else _ties(state)
    # on the CPU in memory of their own, as the file needs them
    tensors = {
        name: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, value in state.items()
        if name not in aliases
    }
    layers = {name: _described(chain) for name, chain in chains.items()}
    record = CompressedModel(MODEL_FORMAT, MODEL_VERSION, type(model).__name__, layers, aliases, densify)
    _write_folder(folder, tensors, msgspec.to_builtins(record) | {"created": now()})


def load_compressed(model: nn.Module, folder, *, impl: str = "auto") -> nn.Module:
    """Give a model the chains and all values that `save_compressed` wrote; its outputs are then the same to the bit.

    Args:
        model: of the same architecture, with dense layers and any values; changed in place. It takes the dtypes of the
            file and keeps its devices. Buffers that are not part of the state_dict stay as they are.
        folder: that `save_compressed` wrote.
        impl: backend of the chains, 'auto', 'triton' or 'bmm'.
    Returns:
        the model; the new layer, if the model is itself a chain.
    Raises:
        UsageError: the folder is damaged or holds a densified model, or the model has another architecture. The model
            is then unchanged.
    """
    folder = Path(folder)
    record = read_json_as(folder / RECORD_FILE, CompressedModel, "a compressed model")
    if record.format != MODEL_FORMAT:
        raise UsageError(f"{folder / RECORD_FILE} is no compressed model; a folder of ks.save_compressed is needed")
    if record.version > MODEL_VERSION:
        raise UsageError(f"{folder} has version {record.version}; {MODEL_VERSION} is the newest known, update ks")
    if record.densified:
        raise UsageError(
            f"{folder} holds an ordinary checkpoint (densify=True); load {TENSORS_FILE} into the model itself"
        )
    inside = unwrapped(model)
    replacements = _empty_chains(inside, record, folder, impl)
    tensors = _read_tensors(folder / TENSORS_FILE)
    if record.version == 1:
        tensors, record.aliases = _as_blocks(tensors, record)
    _check_keys(inside, replacements, tensors, record, folder)
    result = replace_modules(model, replacements)
    _fill(unwrapped(result), tensors, record.aliases)
    return result


def _state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state_dict under the names of an unwrapped model."""
    state = {checkpoint_name(name): value for name, value in model.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"state {one_line(name)!r} of the model is {type(value).__name__}, no tensor; only tensors are saved"
            )
        if value.is_meta:
            raise UsageError(f"{one_line(name)!r} of the model is a meta tensor without values; give it some first")
    return state


def _described(chain: KSLinear) -> CompressedLayer:
    if chain.hands_over_blocks:
        raise UsageError("a chain that takes or leaves features in blocks is saved by the state_dict of its model")
    return CompressedLayer(list(chain.patterns), chain.batch_last, chain.bias is not None, chain.stored_transposed)


def _ties(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the first name of every tensor that has several, by its other names."""
    first: dict[tuple, str] = {}
    ties = {}
    for name, value in state.items():
        memory = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and first.setdefault(memory, name) != name:
            ties[name] = first[memory]
    return ties


def _densified(state: Mapping[str, torch.Tensor], chains: Mapping[str, KSLinear]) -> dict[str, torch.Tensor]:
    """Return a state_dict with one dense weight in the place of the factors of each chain."""
    blocks = {_joined(name, f"block_{index}") for name, chain in chains.items() for index in range(len(chain.patterns))}
    tensors = {name: value for name, value in state.items() if name not in blocks}
    for name, chain in chains.items():
        dense = chain.to_dense()
        tensors[_joined(name, "weight")] = dense.t() if chain.stored_transposed else dense
    return tensors


def _joined(path: str, name: str) -> str:
    """Return the name of a tensor in a state_dict; the model itself has the path ''."""
    return f"{path}.{name}" if path else name


def _check_folder(folder: Path) -> None:
    """Check that a folder is new, empty, or one of ours."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a symbolic link, and nothing is written through one; choose another folder")
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = (
        names == {TENSORS_FILE, RECORD_FILE}
        and read_json_as(folder / RECORD_FILE, CompressedModel).format == MODEL_FORMAT
    )
    if not folder.is_dir() or (names and not ours):
        found = f"holds {one_line(', '.join(sorted(names)[:3]))}" if names else "is no folder"
        raise UsageError(f"{folder} {found}; choose a new or an empty folder, or one that ks.save_compressed wrote")


def _write_folder(folder: Path, tensors: dict[str, torch.Tensor], record: dict) -> None:
    """Write both files into a folder beside, which then takes the place of `folder`."""
    temporary, before = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        with signals.deferred():
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                temporary.mkdir()
                write_safetensors(temporary / TENSORS_FILE, tensors, {"format": "pt"})
                write_json(temporary / RECORD_FILE, record)
                if folder.exists():
                    folder.rename(before)
                temporary.rename(folder)
            except OSError:
                if before.exists():
                    before.rename(folder)
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({one_line(error, 200)})") from error


def _empty_chains(model: nn.Module, record: CompressedModel, folder: Path, impl: str) -> dict[nn.Module, KSLinear]:
    """Return the chains of a record, without values, by the layers that they replace."""
    chains: dict[nn.Module, KSLinear] = {}
    present = {checkpoint_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    linears = linears_of(model)
    for name, layer in record.layers.items():
        patterns = check_patterns(layer.patterns)
        old = present.get(name)
        if isinstance(old, KSLinear) and (old.patterns, old.batch_last) == (patterns, layer.batch_last):
            continue
        linear = linears.get(name)
        rows, cols = patterns[0].rows, patterns[-1].cols
        where = f"{folder} is for another architecture ({one_line(record.model)}): {one_line(name)}"
        if linear is None:
            kind = f"is a {type(old).__name__}" if old is not None else f"is missing ({nearest(name, present)})"
            raise UsageError(f"{where} {kind}, a linear layer {rows} × {cols} is needed")
        weight = linear.module.weight
        assert isinstance(weight, nn.Parameter)
        if linear.weight.shape != (rows, cols):
            raise UsageError(f"{where} has a weight of shape {tuple(weight.shape)}, {rows} × {cols} is needed")
        if linear.module not in chains:
            chain = KSLinear.uninitialised(
                patterns, layer.bias, impl=impl, batch_last=layer.batch_last, device=weight.device, dtype=weight.dtype
            )
            chain.stored_transposed = layer.stored_transposed
            chain.requires_grad_(weight.requires_grad)
            chains[linear.module] = chain.train(linear.module.training)
    return chains


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        check_fits(str(path), path.stat().st_size, "use a machine with more memory")
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} cannot be read ({one_line(error, 200)})") from error


def _as_blocks(tensors: dict[str, torch.Tensor], record: CompressedModel):
    """Return tensors and aliases of version 1, whose factor l has values (a, b, c, d) as factors.l, as blocks."""
    name_of = {
        _joined(name, f"factors.{index}"): _joined(name, f"block_{index}")
        for name, layer in record.layers.items()
        for index in range(len(layer.patterns))
    }
    aliases = {name_of.get(name, name): name_of.get(stored, stored) for name, stored in record.aliases.items()}
    factors = {name: blocks_of(value) for name, value in tensors.items() if name in name_of and value.dim() == 4}
    return {name_of.get(name, name): factors.get(name, value) for name, value in tensors.items()}, aliases


def _check_keys(
    model: nn.Module,
    replacements: Mapping[nn.Module, KSLinear],
    tensors: Mapping[str, torch.Tensor],
    record: CompressedModel,
    folder: Path,
) -> None:
    """Compare names and shapes of the tensors of a file with those that the model will have."""
    state = _state_of(model)
    expected = {name: tuple(value.shape) for name, value in state.items()}
    for path, module in model.named_modules(remove_duplicate=False):
        if module in replacements:
            place = checkpoint_name(path)
            for name in module.state_dict():
                expected.pop(_joined(place, name), None)
            expected |= {_joined(place, name): tuple(v.shape) for name, v in replacements[module].state_dict().items()}
    if not set(record.aliases.values()) <= tensors.keys():
        raise UsageError(f"{folder / RECORD_FILE} is not valid: it ties tensors to one that {TENSORS_FILE} lacks")
    stored = {name: name for name in tensors} | record.aliases
    found = {name: tuple(tensors[first].shape) for name, first in stored.items()}
    where = f"{folder} is for another architecture ({one_line(record.model)})"
    for name in dict.fromkeys((*expected, *found)):
        if expected.get(name) != found.get(name):
            sizes = [str(shapes.get(name, "absent")) for shapes in (found, expected)]
            raise UsageError(f"{where}: {one_line(name)} is {sizes[0]} in the file and {sizes[1]} in the model")
    for name, first in _ties({name: value for name, value in state.items() if name in stored}).items():
        if stored[name] != stored[first]:
            raise UsageError(f"{where}: the model ties {one_line(name)} to {one_line(first)}, the file does not")


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> None:
    """Copy values, so that chains keep the memory order of their factors, and tie the tied tensors again."""
    owners = {
        checkpoint_name(_joined(path, name)): (module, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }
    for name, value in tensors.items():
        module, attribute = owners[name]
        target = getattr(module, attribute)
        if target.dtype != value.dtype:
            target.data = target.data.to(value.dtype)
        target.copy_(value)
    for name, stored in aliases.items():
        (module, attribute), (first, stored_attribute) = owners[name], owners[stored]
        setattr(module, attribute, getattr(first, stored_attribute))
