"""Refinement: train the blocks of a compressed model, one after another, to give the outputs of the dense model."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from ks.errors import UsageError, one_line
from ks.files.atomic import prepare_output_dir, save_tensors
from ks.files.globs import matching, nearest
from ks.files.torch_files import read_torch_file
from ks.files.weights import tensors_sha256
from ks.layer import KSLinear
from ks.model.batches import Mask, call, counted, is_held_out, masks_of, on_device_of, tensors_of
from ks.model.hooks import evaluating
from ks.model.linears import unwrapped

Values = dict[str, torch.Tensor]  # of the trained parameters of a block, by name


class RefinedBlock(NamedTuple):
    """A block after its refinement; an error is the mean of ‖y − ŷ‖² / ‖y‖² over held-out tokens.

    Args:
        name: of the module.
        before: error of its outputs ŷ against those of the dense model, y.
        after: the same for the values that were kept, never larger.
        passes: over the training batches that led to these values; 0 if the block stayed as it was.
    """

    name: str
    before: float
    after: float
    passes: int

    def __str__(self) -> str:
        passes = f"{self.passes} pass{'es' * (self.passes != 1)}"
        return f"{one_line(self.name)}: held-out error {self.before:.3%} → {self.after:.3%}, {passes}"


def refine(
    model: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    blocks: str | Sequence[str],
    *,
    mask: Mask | None = None,
    held_out: float = 0.2,
    passes: int = 3,
    lr: float = 3e-3,
    folder=None,
    quiet: bool = False,
) -> list[RefinedBlock]:
    """Train each block of a compressed model to give the dense block's outputs, for inputs from the blocks before it.

    A block minimises the mean of ‖y − ŷ‖² / ‖y‖² over the tokens, with y and ŷ the outputs of the dense and of the
    compressed model behind this block. AdamW trains its chains and its parameters of one dimension, which are norms and
    biases, unless modules outside the block use them too: one step for each batch, at a rate that falls to zero. After
    each pass the error is measured on held-out batches. The block keeps the values with the least error, those before
    the first pass included, and ends after a pass that did not lower it.

    The other arguments of a block, such as masks and positions, are those of the models before the refinement.

    Time: two passes of all batches through both models, and three more through the compressed one for each pass of
    AdamW. Memory, on the CPU: the inputs of one block for all batches, of both models.

    Source: AA-SVD (arXiv 2604.02119).

    Args:
        model: the dense one, which is not changed.
        small: the compressed one, in float32. Its blocks are changed in place, each when it is done, so that an
            interrupt keeps them.
        batches: as in `ks.collect_input_moments`. With smaller ones there are more steps.
        blocks: globs over the names of modules that pass their outputs to one another, such as `model.layers.*`.
        mask: of the tokens that count, as in `ks.collect_input_moments`; globs are over the names of blocks.
        held_out: fraction of the batches that are held out; every fifth at 0.2.
        passes: at most, for each block.
        lr: rate of AdamW, relative to the root mean square of each tensor.
        folder: gets a file for each block that is done. The same call then goes on where an interrupted one ended, with
            the same result to the bit (with the same number of threads).
        quiet: whether to omit the lines on stderr, one for each block.
    Returns:
        the trained blocks, in the order of their calls.
    Raises:
        UsageError: no block fits or holds a chain, blocks do not follow one another or keep a state, the models share
            what is trained, no batch is left for one of the parts, another dtype, or the folder has files of another
            refinement.
    """
    model, small, batches = unwrapped(model), unwrapped(small), list(batches)
    if passes < 1 or not 0 < lr < 1:
        raise UsageError(f"passes {passes}, lr {lr}: at least one pass and a rate between 0 and 1 are needed")
    split = [is_held_out(index, held_out) for index in range(len(batches))]
    if len({*split}) < 2:
        raise UsageError(f"of {len(batches)} batches, {held_out} is to be held out; both parts need at least one batch")
    names, mask_of = _checked_names(model, small, blocks), [masks_of(small, batch, mask) for batch in batches]
    masks = {name: [of_block(name) for of_block in mask_of] for name in names}
    identity = ""
    if folder is not None:
        folder = prepare_output_dir(folder)
        tensors = [tensor for part in (*batches, *masks.values()) for tensor in tensors_of(part)]
        identity = f"{_hash(*model.state_dict().values(), *tensors)} {held_out} {passes} {lr}"
    done: list[RefinedBlock] = []
    with _repeatable(model), _repeatable(small):
        dense, stream = _Stream(model, names, batches), _Stream(small, names, batches)
        for name in stream.order:
            dense.advance(name)
            if trained := _trained(small, name):
                block, path = small.get_submodule(name), None if folder is None else folder / f"{name}.pth"
                if resumed := path is not None and path.exists():
                    refined, values = _read(path, identity, block)
                else:
                    refined, values = _train(name, trained, stream, dense.hidden, masks[name], split, passes, lr)
                    if path is not None:
                        states = [_state(block, {}), _state(block, values)]
                        content = {"identity": identity, "states": states, "refined": [*refined], "values": values}
                        save_tensors(content, path)
                for key, value in values.items():
                    trained[key].copy_(value)
                done.append(refined)
                if not quiet:
                    print(f"{len(done)}: {refined}{', from the folder' if resumed else ''}", file=sys.stderr)
            stream.advance(name)
    return done


def _checked_names(model: nn.Module, small: nn.Module, blocks: str | Sequence[str]) -> list[str]:
    """Return the names of the blocks, after all checks that need no batch."""
    known = [name for name, _ in small.named_modules() if name]
    wanted = one_line(blocks if isinstance(blocks, str) else ", ".join(blocks))
    names = matching(known, blocks)
    if not names:
        raise UsageError(f"no module of the model matches {wanted!r}; {nearest(wanted, known)}")
    trained = {parameter for name in names for parameter in _trained(small, name).values()}
    if not trained:
        raise UsageError(f"no module that {wanted!r} matches holds a chain; compress the model first")
    if others := {parameter.dtype for parameter in trained} - {torch.float32}:
        raise UsageError(f"the blocks have values in {others.pop()}; refine them in float32: small.float()")
    if trained & {*model.parameters()}:
        raise UsageError("training would change the dense model too; compress a copy of it (copy.deepcopy)")
    return names


def _trained(small: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a block with chains that are trained: chains, norms and biases that it alone uses."""
    block, under = small.get_submodule(name), f"{name}."
    outside = {each for path, each in small.named_parameters(remove_duplicate=False) if not path.startswith(under)}
    chains = {each for module in block.modules() if isinstance(module, KSLinear) for each in module.blocks}
    named = block.named_parameters() if chains else ()
    return {key: each for key, each in named if (each in chains or each.ndim == 1) and each not in outside}


@contextlib.contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a time, without the cache of transformers, which keeps keys and values."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(evaluating(model))
        config: Any = getattr(model, "config", model)
        if hasattr(config, "use_cache"):
            undo.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False
        yield


class _Stream:
    """The inputs of one block of a model for all batches, on the CPU; in the beginning those of the first block.

    Before, all batches pass through the whole model, for these inputs, for the other arguments of every block, such as
    masks and positions, and for the `order` in which the blocks are called.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: list[Any]):
        self.model, self.hidden = model, list[torch.Tensor]()
        self._others: list[dict[str, tuple[tuple, dict]]] = []  # of each batch, by the name of the block
        self._last: torch.Tensor | None = None  # output of the last block that was called
        with contextlib.ExitStack() as hooks:
            for name in names:
                block = model.get_submodule(name)
                hooks.callback(block.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(self._leave).remove)
            for batch in batches:
                self._others.append({})
                call(model, on_device_of(model, batch))
                if missing := [name for name in names if name not in self._others[-1]]:
                    raise UsageError(f"a batch does not call block {one_line(missing[0])}; leave it out of the blocks")
        self.order = [*self._others[0]]

    def _enter(self, name: str, _: nn.Module, positional: tuple, named: dict) -> None:
        others = self._others[-1]
        if not positional or name in others or (others and positional[0] is not self._last):
            before = one_line([*others][-1]) if others else "the modules before it"
            raise UsageError(
                f"block {one_line(name)} does not take the output of {before} as its first argument, once for each "
                "batch; give blocks that follow one another"
            )
        if not others:
            self.hidden.append(positional[0].to("cpu", copy=True))
        others[name] = positional[1:], named

    def _leave(self, _: nn.Module, __: tuple, output: Any) -> None:
        self._last = _first(output)

    def output(self, name: str, index: int, values: Values | None = None) -> torch.Tensor:
        """Return the output of a block for a batch, with its own parameters except for those in `values`."""
        block, (positional, named) = self.model.get_submodule(name), self._others[index][name]
        device = next(itertools.chain(block.parameters(), self.model.parameters())).device
        hidden = self.hidden[index].to(device, copy=True)  # a block may add to it in place
        return _first(functional_call(block, values or {}, (hidden, *positional), named))

    def advance(self, name: str) -> None:
        """Take the inputs through a block, to the next one."""
        outputs = [self.output(name, index).cpu() for index in range(len(self.hidden))]
        if not torch.allclose(outputs[0], self.output(name, 0).cpu(), rtol=1e-3, atol=1e-3):
            raise UsageError(f"block {one_line(name)} has a state: called again, it gives other outputs; switch it off")
        self.hidden = outputs


def _first(output: Any) -> torch.Tensor:
    """Return the output of a block, the first one of several."""
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.enable_grad()
def _train(
    name: str,
    trained: dict[str, nn.Parameter],
    stream: _Stream,
    targets: list[torch.Tensor],
    masks: list[torch.Tensor | None],
    split: list[bool],
    passes: int,
    lr: float,
) -> tuple[RefinedBlock, Values]:
    """Return the result for a block, and the values with the least held-out error; its parameters stay as they are.

    Args:
        targets, masks, split: the outputs y, the tokens that count and whether it is held out, of each batch.
    """

    def errors(index: int) -> torch.Tensor:
        """Return ‖y − ŷ‖² / ‖y‖² of each token of a batch that counts."""
        output, mask = stream.output(name, index, values), masks[index]
        if mask is not None and output.shape[:-1] not in (mask.shape, (mask.numel(),)):
            given = f"a mask of shape {tuple(mask.shape)} for outputs of shape {tuple(output.shape)}"
            raise UsageError(f"block {one_line(name)} has {given}; it must have one entry for each token")
        y = counted(targets[index].to(output), mask)
        energy = y.square().sum(-1).clamp(min=torch.finfo(y.dtype).tiny)
        return (y - counted(output, mask)).square().sum(-1) / energy

    training = [index for index, is_held_out in enumerate(split) if not is_held_out]
    values = {key: parameter.detach().clone().requires_grad_() for key, parameter in trained.items()}
    groups = [{"params": [each], "lr": lr * (each.square().mean().sqrt().item() or 1.0)} for each in values.values()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (passes * len(training)))
    kept: list[float] = []  # held-out errors, before the first pass and after each one that lowered it
    for number in range(passes + 1):
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(number)).tolist()
        for place in order if number else ():
            optimizer.zero_grad()
            errors(training[place]).mean().backward(inputs=[*values.values()])
            optimizer.step()
            rate.step()
        with torch.no_grad():
            error = torch.cat([errors(index) for index, is_held_out in enumerate(split) if is_held_out]).mean().item()
        if kept and not error < kept[-1]:
            break
        kept.append(error)
        best = {key: value.detach().clone() for key, value in values.items()}
    return RefinedBlock(name, kept[0], kept[-1], len(kept) - 1), best


def _read(path: Path, identity: str, block: nn.Module) -> tuple[RefinedBlock, Values]:
    """Return the result of `_train` for a block with its values from before the refinement, or from after it."""
    found = read_torch_file(path, "a refined block")
    if not isinstance(found, dict) or found.get("identity") != identity or _state(block, {}) not in found["states"]:
        raise UsageError(f"{path} is of another refinement; give another folder, or the models as they were")
    return RefinedBlock(*found["refined"]), found["values"]


def _state(block: nn.Module, values: Values) -> str:
    """Return a hash of the tensors of a block, with values in the place of some."""
    return _hash(*(dict(block.named_parameters()) | dict(block.named_buffers()) | values).values())


def _hash(*tensors: torch.Tensor) -> str:
    return tensors_sha256(*(tensor.detach().cpu() for tensor in tensors))
