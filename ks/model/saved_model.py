"""Compressed models in folders: all tensors as .safetensors, the chains as JSON, no pickle."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from ks.chain.patterns import check_patterns
from ks.chain.product import blocks_of
from ks.errors import UsageError, one_line
from ks.files.atomic import write_json
from ks.files.globs import nearest
from ks.files.provenance import now
from ks.files.schema import CompressedLayer, CompressedModel
from ks.files.weights import read_entry, shape_of
from ks.layer import KSLinear
from ks.model.linears import checkpoint_name, joined, linears_of, modules_of, place_of, replace_modules, unwrapped
from ks.model.model_card import model_card
from ks.model.model_plan import ModelPlan
from ks.model.saved_folder import (
    CARD_FILE,
    CHAINS_FILE,
    DENSE_FILE,
    MODEL_FORMAT,
    MODEL_VERSION,
    RECORD_FILE,
    check_replaceable,
    entries_in,
    read_record,
    replacing,
    stored_tensors,
    write_tensors,
)
from ks.model.transformers_model import empty_model, is_of_transformers, write_configuration


def save_compressed(
    model: nn.Module,
    folder,
    *,
    plan=None,
    tokenizer: Any = None,
    densify: bool = False,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a model with chains to a folder: its tensors as .safetensors, its chains in compressed.json, and README.md.

    A model of transformers gets its configuration beside them, so that `ks.load_compressed(folder)` needs nothing else.
    `from_pretrained` refuses the folder, unless it is densified. The folder is written beside its place and then
    renamed, so that it is complete or absent. One that this function wrote earlier is replaced.

    Args:
        model: with `KSLinear` layers; `ks.compress` makes one. Tensors that are tied are stored once.
        folder: new, empty, or of an earlier call.
        plan: a `ks.model.model_plan.ModelPlan` of the model or its file, for the table and the predicted and measured
            loss in README.md.
        tokenizer: whose `save_pretrained(folder)` adds its files.
        densify: write an ordinary checkpoint instead, for programs that know no chains: every chain is multiplied out
            into a dense weight under the name that it had, and tied tensors are stored under each of their names.
        max_shard_size: of a file with tensors, in bytes; more go into several files with an index.
    Raises:
        UsageError: the folder holds something else or cannot be written, the model has state that is no tensor, or the
            plan is that of another model.
    """
    folder = Path(folder).absolute()
    check_replaceable(folder)
    model = unwrapped(model)
    chains = {name: module for name, module in modules_of(model).items() if isinstance(module, KSLinear)}
    state, buffers = _state_of(model), {} if densify else _buffers_beside(model)
    for name, value in (state | buffers).items():
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise UsageError(f"state {one_line(name)!r} of the model is {kind}, no tensor; only tensors are saved")
        if value.is_meta:
            raise UsageError(f"{one_line(name)!r} of the model is a meta tensor without values; give it some first")
    aliases = {} if densify else _ties(state | buffers)
    layers = {name: _described(chain) for name, chain in chains.items()}
    record = CompressedModel(MODEL_FORMAT, MODEL_VERSION, type(model).__name__, layers, aliases, densify, [*buffers])
    plan = ModelPlan.load(plan) if isinstance(plan, (str, os.PathLike)) else plan
    card = model_card(model, chains, plan, folder.name, with_tokenizer=tokenizer is not None, densified=densify)
    with replacing(folder) as new:
        tensors = _densified(state, chains) if densify else iter((state | buffers).items())
        stored = ((name, value) for name, value in tensors if name not in aliases)
        write_tensors(new / (DENSE_FILE if densify else CHAINS_FILE), stored, max_shard_size)
        if is_of_transformers(model):
            write_configuration(model, new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / CARD_FILE).write_text(card, "utf-8")
        record.files = entries_in(new)
        write_json(new / RECORD_FILE, msgspec.to_builtins(record) | {"created": now()})


def load_compressed(model: nn.Module | str | os.PathLike, folder=None, *, impl: str = "auto") -> nn.Module:
    """Return the model that `save_compressed` wrote, with its outputs to the bit: `load_compressed(folder)`.

    The dense weights are never in memory, and no code of the folder runs. A model that is no class of transformers is
    given before the folder, which then fills it.

    Args:
        model: the folder; or a model of the same architecture, with dense layers and any values, changed in place. It
            takes the dtypes of the file and keeps its devices; what is on the meta device goes to the default device of
            torch. Its buffers that are not part of the state_dict stay as they are, unless they are on the meta device.
        folder: that `save_compressed` wrote, behind a model.
        impl: backend of the chains, 'auto', 'triton' or 'bmm'.
    Returns:
        the model, one made here in evaluation mode; the new layer, if the model is itself a chain.
    Raises:
        UsageError: the folder is damaged or holds a densified model; the model has another architecture, and is then
            unchanged; or there is no class of the installed transformers to make it.
    """
    if isinstance(model, nn.Module) == (folder is None):
        raise UsageError("ks.load_compressed takes a folder, or a model and a folder")
    folder = Path(model if folder is None else folder)  # type: ignore[arg-type]
    record = read_record(folder)
    if record.densified:
        raise UsageError(
            f"{folder} holds an ordinary checkpoint (densify=True); load it by from_pretrained of {record.model}, or "
            "its tensors into the model itself"
        )
    if not isinstance(model, nn.Module):
        model = empty_model(folder, record.model)
    inside, where = unwrapped(model), f"{folder} is for another architecture ({one_line(record.model)})"
    replacements = _empty_chains(inside, record, where, impl)
    tensors = stored_tensors(folder, record.version)
    if record.version == 1:
        tensors, record.aliases = _as_blocks({name: read_entry(tensors[name], name) for name in tensors}, record)
    state = _state_of(inside) | _meta_buffers_beside(inside)
    for name in {*record.buffers} - state.keys():
        tensors.pop(name, None)
        record.aliases.pop(name, None)
    if not set(record.aliases.values()) <= tensors.keys():
        raise UsageError(f"{folder / RECORD_FILE} is not valid: it ties tensors to one that the files lack")
    replaced = {name: replacements[module] for name, module in modules_of(inside).items() if module in replacements}
    _check_keys(state, replaced, tensors, record.aliases, where)
    result = replace_modules(model, replacements)
    _fill(unwrapped(result), tensors, record.aliases)
    return result


def _state_of(model: nn.Module) -> dict[str, Any]:
    """Return the state_dict under the names of an unwrapped model."""
    return {checkpoint_name(name): value for name, value in model.state_dict().items()}


def _buffers_beside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that are not part of the state_dict, such as the frequencies of rotary embeddings.

    A long input can change these frequencies, and a loaded model has not seen it: the first ones, which transformers
    keeps as original_…, take their place.
    """
    return {
        joined(path, name): value if (first := module._buffers.get(f"original_{name}")) is None else first
        for path, module in modules_of(model).items()
        for name, value in module._buffers.items()
        if name in module._non_persistent_buffers_set and value is not None
    }


def _meta_buffers_beside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return those of `_buffers_beside` that are on the meta device.

    Raises:
        UsageError: a module has another tensor there, which no folder has.
    """
    for path, module in modules_of(model).items():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise UsageError(
                    f"{one_line(joined(path, name))} of the model is on the meta device and no buffer; give a model "
                    "that was not made there: ks.load_compressed(model, folder)"
                )
    return {name: value for name, value in _buffers_beside(model).items() if value.is_meta}


def _described(chain: KSLinear) -> CompressedLayer:
    if chain.hands_over_blocks:
        raise UsageError("a chain that takes or leaves features in blocks is saved by the state_dict of its model")
    return CompressedLayer(list(chain.patterns), chain.batch_last, chain.bias is not None, chain.stored_transposed)


def _ties(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the first name of every tensor that has several, by its other names."""
    first: dict[tuple, str] = {}
    ties = {}
    for name, value in state.items():
        if value.numel() and first.setdefault(place_of(value), name) != name:
            ties[name] = first[place_of(value)]
    return ties


def _densified(state: Mapping[str, torch.Tensor], chains: Mapping[str, KSLinear]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a state_dict with one dense weight in the place of the factors of each chain."""
    blocks = {joined(name, f"block_{index}") for name, chain in chains.items() for index in range(len(chain.patterns))}
    yield from ((name, value) for name, value in state.items() if name not in blocks)
    for name, chain in chains.items():
        dense = chain.to_dense()
        yield joined(name, "weight"), dense.t() if chain.stored_transposed else dense


def _empty_chains(model: nn.Module, record: CompressedModel, where: str, impl: str) -> dict[nn.Module, KSLinear]:
    """Return the chains of a record, without values, by the layers that they replace; `where` begins a message."""
    chains: dict[nn.Module, KSLinear] = {}
    present, linears = modules_of(model), linears_of(model)
    for name, layer in record.layers.items():
        patterns = check_patterns(layer.patterns)
        old = present.get(name)
        if isinstance(old, KSLinear) and (old.patterns, old.batch_last) == (patterns, layer.batch_last):
            continue
        linear = linears.get(name)
        rows, cols = patterns[0].rows, patterns[-1].cols
        if linear is None:
            kind = f"is a {type(old).__name__}" if old is not None else f"is missing ({nearest(name, present)})"
            raise UsageError(f"{where}: {one_line(name)} {kind}, a linear layer {rows} × {cols} is needed")
        weight = linear.module.weight
        assert isinstance(weight, nn.Parameter)
        if linear.weight.shape != (rows, cols):
            shape = f"a weight of shape {tuple(weight.shape)}"
            raise UsageError(f"{where}: {one_line(name)} has {shape}, {rows} × {cols} is needed")
        if linear.module not in chains:
            chain = KSLinear.uninitialised(
                patterns, layer.bias, impl=impl, batch_last=layer.batch_last, device=weight.device, dtype=weight.dtype
            )
            chain.stored_transposed = layer.stored_transposed
            chain.requires_grad_(weight.requires_grad)
            chains[linear.module] = chain.train(linear.module.training)
    return chains


def _as_blocks(tensors: dict[str, torch.Tensor], record: CompressedModel):
    """Return tensors and aliases of version 1, whose factor l has values (a, b, c, d) as factors.l, as blocks."""
    name_of = {
        joined(name, f"factors.{index}"): joined(name, f"block_{index}")
        for name, layer in record.layers.items()
        for index in range(len(layer.patterns))
    }
    aliases = {name_of.get(name, name): name_of.get(stored, stored) for name, stored in record.aliases.items()}
    factors = {name: blocks_of(value) for name, value in tensors.items() if name in name_of and value.dim() == 4}
    return {name_of.get(name, name): factors.get(name, value) for name, value in tensors.items()}, aliases


def _check_keys(
    state: Mapping[str, torch.Tensor],
    replaced: Mapping[str, KSLinear],
    tensors: Mapping[str, Any],
    aliases: Mapping[str, str],
    where: str,
) -> None:
    """Compare names, shapes and ties of the tensors of a file with those that the model will have.

    Args:
        state: of the model before the layers are replaced, under the names of a file.
        replaced: the new chains, by the names of their layers.
    """
    expected = {name: tuple(each.shape) for name, each in state.items() if name.rpartition(".")[0] not in replaced}
    for path, chain in replaced.items():
        expected |= {joined(path, name): tuple(each.shape) for name, each in chain.state_dict().items()}
    stored = {name: name for name in tensors} | dict(aliases)
    found = {name: shape_of(tensors[first]) for name, first in stored.items()}
    for name in dict.fromkeys((*expected, *found)):
        if expected.get(name) != found.get(name):
            sizes = [str(shapes.get(name, "absent")) for shapes in (found, expected)]
            raise UsageError(f"{where}: {one_line(name)} is {sizes[0]} in the file and {sizes[1]} in the model")
    for name, first in _ties({name: value for name, value in state.items() if name in stored}).items():
        if stored[name] != stored[first]:
            raise UsageError(f"{where}: the model ties {one_line(name)} to {one_line(first)}, the file does not")


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
    """Copy values, so that chains keep the memory order of their factors, and tie the tied tensors again."""
    place = torch.get_default_device()
    model._apply(lambda tensor: torch.empty_like(tensor, device=place) if tensor.is_meta else tensor)
    owners = {
        joined(path, name): (module, name)
        for path, module in modules_of(model).items()
        for name in (*module._parameters, *module._buffers)
    }
    for name, entry in tensors.items():
        module, attribute = owners[name]
        value, target = read_entry(entry, name), getattr(module, attribute)
        if target.dtype != value.dtype:
            target.data = torch.empty_like(target, dtype=value.dtype)
        target.copy_(value)
    for name, stored in aliases.items():
        (module, attribute), (first, stored_attribute) = owners[name], owners[stored]
        setattr(module, attribute, getattr(first, stored_attribute))
