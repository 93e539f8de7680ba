"""A model while batches pass through it: in evaluation mode, with hooks on its linear layers; then it is as before."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ks.errors import UsageError
from ks.model.linears import Linear

Take = Callable[[str, torch.Tensor], None]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module, gradients: bool = False) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients or with them; every module has its mode back at the end.

    The mode is set without calling `eval` and `train`, which may do work: those of adapters change weights. Nested
    tensors, which nn.TransformerEncoder makes of padded batches, have no shape to compare with a mask, and are off.
    """
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            module.training = False
            if isinstance(module, torch.nn.TransformerEncoder):
                undo.callback(setattr, module, "use_nested_tensor", module.use_nested_tensor)
                module.use_nested_tensor = False
        if "torch._dynamo" in sys.modules:  # a compiled part runs without the hooks that came after its compilation
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            yield


@contextlib.contextmanager
def observed(
    model: torch.nn.Module, linears: Mapping[str, Linear], inputs: Take, gradients: Take | None
) -> Iterator[None]:
    """Hook linear layers of a model in evaluation mode, and leave the model as it was at the end.

    For gradients, no parameter requires one in the meantime: the graph starts at the outputs of the modules that have
    parameters, so that it is the usual one without the gradients of the weights.

    Args:
        inputs: called with the name and the inputs of a layer, in each forward pass.
        gradients: called with the name and the gradients at the outputs of a layer, in each backward pass; None for no
            gradients.
    """

    def take(name: str, module: torch.nn.Module, positional: tuple, named: dict) -> None:
        inputs(name, (positional[0] if positional else next(iter(named.values()))).detach())

    with contextlib.ExitStack() as undo:
        for name, linear in linears.items():
            undo.callback(linear.module.register_forward_pre_hook(partial(take, name), with_kwargs=True).remove)
        if gradients is not None:
            undo.enter_context(_frozen(model))
            for module in model.modules():
                if module._parameters:
                    undo.callback(module.register_forward_hook(_start).remove)
            for name, linear in linears.items():
                hook = partial(_tap, partial(gradients, name))
                undo.callback(linear.module.register_forward_hook(hook).remove)
        with evaluating(model, gradients is not None):
            yield


def _start(module: torch.nn.Module, positional: tuple, output: Any) -> torch.Tensor | None:
    """Let the graph start at an output that does not belong to it yet; a leaf could not be changed in place."""
    if not torch.is_tensor(output) or not output.is_floating_point() or output.requires_grad:
        return None
    return output + output.new_zeros((), requires_grad=True)


def _tap(take: Callable[[torch.Tensor], None], module: torch.nn.Module, positional: tuple, output: torch.Tensor):
    if not output.requires_grad:  # in the first pass of a reentrant checkpoint, or below torch.no_grad
        return None
    tapped = output.clone() if output._is_view() else output  # changed in place, a view loses its hooks
    tapped.register_hook(take)
    return tapped


@contextlib.contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient for a time; found again by name, since offloading replaces parameters."""
    required = {name: each.requires_grad for name, each in model.named_parameters(remove_duplicate=False)}
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UsageError("the model was made in inference mode, which has no gradients; make it outside")
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(required[name])
