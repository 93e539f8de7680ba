"""Refinement: train the blocks of a compressed model, one after another, to give the outputs of the dense model."""

import contextlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.func import functional_call

from ks.errors import UsageError, one_line
from ks.files.atomic import prepare_output_dir, save_tensors
from ks.files.globs import matching, nearest
from ks.files.torch_files import read_torch_file
from ks.files.weights import tensors_sha256
from ks.layer import KSLinear
from ks.model.batches import MaskFunction, call, evaluating, mask_of, on_device_of
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
    mask: MaskFunction | None = None,
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

    Time: all blocks of both models run once, and those of the compressed one three times more for each pass. Memory, on
    the CPU: the inputs of one block for all batches, of both models.

    Source: AA-SVD (arXiv 2604.02119).

    Args:
        model: the dense one. It is not changed; parameters that `small` shares with it are copied before they change.
        small: the compressed one, in float32. Its blocks are changed in place, each when it is done, so that an
            interrupt keeps them.
        batches: as in `ks.collect_input_moments`. With smaller ones there are more steps.
        blocks: globs over the names of modules that pass their outputs to one another, such as `model.layers.*`.
        mask: of the tokens that count, as in `ks.collect_input_moments`.
        held_out: fraction of the batches that are held out; every fifth at 0.2.
        passes: at most, for each block.
        lr: rate of AdamW, relative to the root mean square of each tensor.
        folder: gets a file for each block that is done. The same call then goes on where an interrupted one ended, with
            the same result to the bit (with the same number of threads).
        quiet: whether to omit the lines on stderr, one for each block.
    Returns:
        the trained blocks, in the order of their calls.
    Raises:
        UsageError: no block fits or holds a chain, blocks do not follow one another or keep a state, no batch is left
            for one of the parts, another dtype, or the folder has files of another refinement.
    """
    model, small, batches = unwrapped(model), unwrapped(small), list(batches)
    if passes < 1 or not 0 < lr < 1:
        raise UsageError(f"passes {passes}, lr {lr}: at least one pass and a rate between 0 and 1 are needed")
    split = [math.floor((i + 1) * held_out + 1e-9) > math.floor(i * held_out + 1e-9) for i in range(len(batches))]
    if len({*split}) < 2:
        raise UsageError(f"of {len(batches)} batches, {held_out} is to be held out; both parts need at least one batch")
    names, masks = _blocks(model, small, blocks), [mask_of(batch, mask) for batch in batches]
    files = None if folder is None else _Files(folder, model, batches, masks, f"{split} {passes} {lr}")
    done: list[RefinedBlock] = []
    with evaluating(model), evaluating(small):
        dense, stream = _Stream(model, names, batches), _Stream(small, names, batches)
        for name in stream.order:
            dense.advance(name)
            block, trained = small.get_submodule(name), _trained(small, name)
            if trained and _has_chain(block):
                found = files.read(block, name) if files else None
                start = {key: parameter.detach().clone() for key, parameter in trained.items()}
                refined, values = found or _Task(name, stream, dense.hidden, masks, split).train(start, passes, lr)
                if files and not found:
                    files.write(block, refined, values)
                _assign(block, values, {*model.parameters()})
                done.append(refined)
                if not quiet:
                    print(f"{len(done)}: {refined}{', from the folder' if found else ''}", file=sys.stderr)
            stream.advance(name)
    return done


def _blocks(model: nn.Module, small: nn.Module, blocks: str | Sequence[str]) -> list[str]:
    """Return the names of the blocks, after all checks that need no batch."""
    dense, known = ({name: each for name, each in whole.named_modules() if name} for whole in (model, small))
    wanted = one_line(blocks if isinstance(blocks, str) else ", ".join(blocks))
    names = matching(known, blocks)
    if not names:
        raise UsageError(f"no module of the model matches {wanted!r}; {nearest(wanted, known)}")
    if _has_chain(model):
        raise UsageError("the dense model holds chains itself; compress a copy of it (copy.deepcopy), and give both")
    if missing := [name for name in names if name not in dense]:
        raise UsageError(f"the dense model has no block {one_line(missing[0])!r}; give the model that was compressed")
    if not any(_has_chain(known[name]) for name in names):
        raise UsageError(f"no module that {wanted!r} matches holds a chain; compress the model first")
    if others := {each.dtype for name in names for each in _trained(small, name).values()} - {torch.float32}:
        raise UsageError(f"the blocks have values in {others.pop()}; refine them in float32: small.float()")
    return names


def _has_chain(module: nn.Module) -> bool:
    return any(isinstance(each, KSLinear) for each in module.modules())


def _trained(small: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that are trained: those of chains, norms and biases that it alone uses."""
    block, under = small.get_submodule(name), f"{name}."
    outside = {each for path, each in small.named_parameters(remove_duplicate=False) if not path.startswith(under)}
    chains = {each for module in block.modules() if isinstance(module, KSLinear) for each in module.blocks}
    named = block.named_parameters()
    return {key: each for key, each in named if (each in chains or each.ndim == 1) and each not in outside}


class _LastBlock(Exception):
    """The last block was entered: the rest of the model is of no use."""


class _Stream:
    """The inputs of one block of a model for all batches, on the CPU; in the beginning those of the first block.

    The first batch passes through the whole model. The other batches skip the blocks; they are run for the arguments
    that the blocks get besides their inputs, such as masks and positions.

    Args:
        order: names of the blocks in the order of their calls.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: list[Any]):
        self.model, self.hidden = model, list[torch.Tensor]()
        self._others: dict[str, list[tuple[tuple, dict]]] = {name: [] for name in names}
        self._rest: dict[str, tuple | None] = {}  # of the outputs of each block, None for a single tensor
        for batch in batches:
            self.order: list[str] = []
            self._last: torch.Tensor | None = None
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(contextlib.suppress(_LastBlock))
                for name in names:
                    block = model.get_submodule(name)
                    hooks.callback(block.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True).remove)
                    if self.hidden:
                        hooks.enter_context(mock.patch.object(block, "forward", partial(self._skip, name)))
                    else:
                        hooks.callback(block.register_forward_hook(partial(self._leave, name)).remove)
                call(model, on_device_of(model, batch))
            if missing := [name for name in names if name not in self.order]:
                raise UsageError(f"a batch does not call block {one_line(missing[0])}; leave it out of the blocks")
            if len(self.hidden) == 1:
                self._check_repeats()

    def _enter(self, name: str, _: nn.Module, positional: tuple, named: dict) -> None:
        if not positional or name in self.order or (self.order and positional[0] is not self._last):
            before = one_line(self.order[-1]) if self.order else "the modules before it"
            raise UsageError(
                f"block {one_line(name)} does not take the output of {before} as its first argument, once for each "
                "batch; give blocks that follow one another"
            )
        if not self.order:
            self.hidden.append(positional[0].to("cpu", copy=True))
        self.order.append(name)
        self._others[name].append((positional[1:], named))
        if len(self.hidden) > 1 and len(self.order) == len(self._others):
            raise _LastBlock

    def _leave(self, name: str, _: nn.Module, __: tuple, output: Any) -> None:
        self._last = _first(output)
        self._rest[name] = None if output is self._last else tuple(output[1:])
        self._copy = self._last.clone()

    def _skip(self, name: str, hidden: torch.Tensor, *_, **__) -> Any:
        self._last, rest = hidden, self._rest[name]
        return hidden if rest is None else (hidden, *rest)

    def _check_repeats(self) -> None:
        first = self.hidden
        for name in self.order:
            self.advance(name)
        if not torch.allclose(self.hidden[0], self._copy.cpu(), rtol=1e-3, atol=1e-3):
            raise UsageError(
                "the blocks give other outputs when they are called again; switch their state off, such as a cache "
                "(model.config.use_cache = False, in both models)"
            )
        self.hidden = first

    def output(self, name: str, index: int, values: Values | None = None) -> torch.Tensor:
        """Return the output of a block for a batch, with its own parameters except for those in `values`."""
        block = self.model.get_submodule(name)
        positional, named = self._others[name][index]
        hidden = self.hidden[index].to(next(block.parameters()).device)
        return _first(functional_call(block, values or {}, (hidden, *positional), named))

    def advance(self, name: str) -> None:
        """Take the inputs through a block, to the next one."""
        self.hidden = [self.output(name, index).cpu() for index in range(len(self.hidden))]


def _first(output: Any) -> torch.Tensor:
    """Return the output of a block, the first one of several."""
    return output if isinstance(output, torch.Tensor) else output[0]


class _Task(NamedTuple):
    """A block to be trained, with the outputs of the dense model for each batch."""

    name: str
    stream: _Stream
    targets: list[torch.Tensor]
    masks: list[torch.Tensor | None]
    split: list[bool]  # whether a batch is held out

    def errors(self, index: int, values: Values) -> torch.Tensor:
        """Return ‖y − ŷ‖² / ‖y‖² of each token of a batch that counts."""
        output = self.stream.output(self.name, index, values)
        target, mask = self.targets[index].to(output.device), self.masks[index]
        errors = (output - target).square().sum(-1) / target.square().sum(-1).clamp(min=torch.finfo(target.dtype).tiny)
        if mask is None:
            return errors.flatten()
        if mask.numel() != errors.numel():
            given = f"a mask of shape {tuple(mask.shape)} for outputs of shape {tuple(output.shape)}"
            raise UsageError(f"block {one_line(self.name)} has {given}; it must have one entry for each token")
        return errors.flatten()[mask.flatten().to(output.device, torch.bool)]

    @torch.no_grad()
    def held_out_error(self, values: Values) -> float:
        return torch.cat([self.errors(i, values) for i, held_out in enumerate(self.split) if held_out]).mean().item()

    @torch.enable_grad()
    def train(self, start: Values, passes: int, lr: float) -> tuple[RefinedBlock, Values]:
        """Return the result, and the values with the least held-out error."""
        training = [index for index, held_out in enumerate(self.split) if not held_out]
        values = {key: value.clone().requires_grad_() for key, value in start.items()}
        groups = [
            {"params": [each], "lr": lr * (each.square().mean().sqrt().item() or 1.0)} for each in values.values()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (passes * len(training)))
        best, before = start, self.held_out_error(start)
        refined = RefinedBlock(self.name, before, before, 0)
        for number in range(1, passes + 1):
            for place in torch.randperm(len(training), generator=torch.Generator().manual_seed(number)).tolist():
                gradients = torch.autograd.grad(self.errors(training[place], values).mean(), [*values.values()])
                for each, gradient in zip(values.values(), gradients):
                    each.grad = gradient
                optimizer.step()
                rate.step()
            error = self.held_out_error(values)
            if not error < refined.after:
                break
            refined = refined._replace(after=error, passes=number)
            best = {key: value.detach().clone() for key, value in values.items()}
        return refined, best


@torch.no_grad()
def _assign(block: nn.Module, values: Values, shared: set[nn.Parameter]) -> None:
    """Write values into the parameters of a block; those that the dense model shares are replaced by their own."""
    for key, value in values.items():
        parameter = block.get_parameter(key)
        if torch.equal(parameter, value):
            continue
        if parameter not in shared:
            parameter.copy_(value)
            continue
        own = nn.Parameter(value, parameter.requires_grad)
        for module in block.modules():
            module._parameters.update({leaf: own for leaf, each in module._parameters.items() if each is parameter})


class _Files:
    """The blocks that are done, a file for each, and what they depend on."""

    def __init__(self, folder, model: nn.Module, batches: list[Any], masks: list, settings: str):
        self.folder = prepare_output_dir(folder)
        parts = [[*batch.values()] if isinstance(batch, Mapping) else batch for batch in batches]
        flat = [*model.state_dict().values(), *(each for part in (*parts, masks) for each in part)]
        tensors = [each.detach().cpu() for each in flat if isinstance(each, torch.Tensor)]
        self.identity = f"{tensors_sha256(*tensors)} {settings}"

    def read(self, block: nn.Module, name: str) -> tuple[RefinedBlock, Values] | None:
        """Return the result of a block, None if it has no file."""
        path = self.folder / f"{name}.pth"
        if not path.exists():
            return None
        found = read_torch_file(path, "a refined block")
        if not isinstance(found, dict) or found.get("identity") != self.identity or not _starts_or_ends(found, block):
            raise UsageError(f"{path} is of another refinement; give another folder, or the models as they were")
        return RefinedBlock(*found["refined"]), found["values"]

    def write(self, block: nn.Module, refined: RefinedBlock, values: Values) -> None:
        """Write the file of a block that still has its values from before."""
        content = {"identity": self.identity, "start": _hash(block), "refined": [*refined], "values": values}
        save_tensors(content, self.folder / f"{refined.name}.pth")


def _starts_or_ends(found: dict, block: nn.Module) -> bool:
    """Return whether a block has its values from before the refinement, or those from after it."""
    values = found["values"]
    return found["start"] == _hash(block) or all(
        torch.equal(block.get_parameter(key).cpu(), value.cpu()) for key, value in values.items()
    )


def _hash(block: nn.Module) -> str:
    return tensors_sha256(*(each.detach().cpu() for each in block.state_dict().values()))
