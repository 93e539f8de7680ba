"""The linear layers of a model, by the names that its checkpoint uses; other modules take their place."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ks.layer import KSLinear

# Components that torch puts into the names of modules; a checkpoint does not have them.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


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


def joined(path: str, name: str) -> str:
    """Return the name of a tensor or module in the module at a path; the model itself has the path ''."""
    return f"{path}.{name}" if path else name


def place_of(tensor: torch.Tensor) -> tuple:
    """Return where the values of a tensor are in memory, equal for tied tensors alone, also on the meta device."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by the names that a checkpoint uses; one may have several, and the model itself has ''."""
    return {checkpoint_name(path): module for path, module in unwrapped(model).named_modules(remove_duplicate=False)}


def linears_of(model: nn.Module) -> dict[str, Linear]:
    """Return all nn.Linear and Conv1D layers by the names that a checkpoint uses; the weight's key is `NAME.weight`."""
    linears = {}
    for name, module in modules_of(model).items():
        if isinstance(module, nn.Linear):
            linears[name] = Linear(module, module.in_features, joined(name, "weight"), False)
        elif _is_conv1d(module):
            linears[name] = Linear(module, len(module.get_parameter("weight")), joined(name, "weight"), True)
    return linears


def refusals(model: nn.Module) -> dict[str, str]:
    """Return why a chain cannot take the place of a layer, by the key of its weight; other layers are not listed.

    A layer can be replaced if it computes x Wᵀ + b with its weight and its bias alone, and nothing else uses them.
    """
    linears = linears_of(model)
    replaceable = {linear.module for linear in linears.values()}
    other_use: dict[object, str] = {}
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, nn.MultiheadAttention):
            other_use[module.out_proj.weight] = "nn.MultiheadAttention uses it without calling its layer"
        if module not in replaceable:
            used = f"{path} ({type(module).__name__}) uses it too"
            other_use |= {parameter: used for parameter in module.parameters(recurse=False)}
    reasons = {
        linear.key: _more_than_linear(linear) or other_use.get(linear.module.weight) for linear in linears.values()
    }
    return {key: reason for key, reason in reasons.items() if reason}


def parameters_of(model: nn.Module) -> dict[str, tuple[int, str]]:
    """Return the size of every parameter of a model, 0 for one that has come before, and the kind of its module."""
    parts, seen = {}, set()
    for path, module in unwrapped(model).named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            key = checkpoint_name(joined(path, name))
            size = 0 if parameter in seen or isinstance(parameter, UninitializedParameter) else parameter.numel()
            seen.add(parameter)
            parts[key] = size, "biases" if name == "bias" else type(module).__name__
    return parts


def coverage(parts: Mapping[str, tuple[int, str]], chosen: Collection[str]) -> str:
    """Return a sentence: how many parameters the chosen weights have, and where the others are.

    Args:
        parts: number of values and kind of every parameter, by name.
        chosen: names among them.
    """
    total, others = sum(size for size, _ in parts.values()), Counter[str]()
    for name, (size, kind) in parts.items():
        if name not in chosen:
            others[kind] += size
    planned = total - others.total()
    where = ", ".join(f"{size / total:.1%} {kind}" for kind, size in others.most_common(4) if size)
    return f"{planned:,} of {total:,} parameters ({planned / total:.1%})" + (f"; the others: {where}" if where else "")


def _more_than_linear(linear: Linear) -> str | None:
    """Return in which way a layer is more than x Wᵀ + b, or None."""
    module = linear.module
    if isinstance(module.weight, UninitializedParameter):
        return "a lazy layer without values; run the model once"
    for name in ("weight", "bias"):
        if getattr(module, name, None) is not None and name not in module._parameters:
            return f"its {name} is computed from other tensors; remove its parametrization"
    if own := sorted({name for name, _ in (*module.named_parameters(), *module.named_buffers())} - {"weight", "bias"}):
        return f"it has tensors of its own ({', '.join(own[:3])})"
    is_plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    if is_plain or module.weight.is_meta or _computes_linear(linear):
        return None
    return f"the forward pass of its class, {type(module).__name__}, does not compute x Wᵀ + b"


@torch.no_grad()
def _computes_linear(linear: Linear) -> bool:
    """Return whether a layer maps random inputs to x Wᵀ + b in both modes, hooks left out."""
    module, mode = linear.module, linear.module.training
    x = torch.randn(8, linear.width, generator=torch.Generator().manual_seed(0)).to(linear.weight)
    expected = nn.functional.linear(x, linear.weight, module._parameters.get("bias"))
    try:
        for module.training in (False, True):
            torch.testing.assert_close(module.forward(x), expected, rtol=1e-2, atol=1e-3 * expected.norm().item())
    except Exception:  # anything may go wrong in a forward that takes other inputs
        return False
    finally:
        module.training = mode
    return True


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and data parallelism."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else unwrapped(compiled)


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
