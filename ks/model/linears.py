"""The linear layers of a model, by the names that its checkpoint uses; other modules take their place."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ks.layer import KSLinear

# Components that torch puts into the names of modules; a checkpoint does not have them.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Linear:
    """A linear layer of a model: its width n, the key of its weight in a checkpoint, whether that is (in, out)."""

    module: nn.Module
    width: int
    key: str
    transposed: bool

    @property
    def weight(self) -> torch.Tensor:
        """W of shape (m, n), a view of the parameter, which Conv1D keeps as (n, m)."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach().t() if self.transposed else weight.detach()


def checkpoint_name(path: str) -> str:
    """Return the name of a module or tensor without the components that torch.compile, FSDP and such add."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def linears_of(model: nn.Module) -> dict[str, Linear]:
    """Return all nn.Linear and Conv1D layers by the names that a checkpoint uses; the weight's key is `NAME.weight`."""
    linears = {}
    for path, module in unwrapped(model).named_modules(remove_duplicate=False):
        name = checkpoint_name(path)
        if isinstance(module, nn.Linear):
            linears[name] = Linear(module, module.in_features, f"{name}.weight".lstrip("."), False)
        elif _is_conv1d(module):
            linears[name] = Linear(module, len(module.weight), f"{name}.weight".lstrip("."), True)
    return linears


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and data parallelism."""
    if isinstance(model, PARALLEL):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else unwrapped(compiled)


def light_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose modules are its own and whose tensors are shared."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _is_conv1d(module: nn.Module) -> bool:
    """Recognise the Conv1D of transformers, a linear layer with a weight (in, out), without importing transformers."""
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).mro())


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the place of others, under every name that they have.

    Args:
        model: changed in place, unless it is itself one of those that are replaced.
        replacements: new module, by the old one.
    Returns:
        the model, or its replacement.
    """
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and child in replacements:
                module._modules[name] = replacements[child]
                if isinstance(module, nn.TransformerEncoderLayer):
                    module.activation_relu_or_gelu = 0  # without its fast path, which reads weights
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(each, KSLinear) for each in module.modules()):
            module.use_nested_tensor = False  # likewise
    return replacements.get(model, model)
