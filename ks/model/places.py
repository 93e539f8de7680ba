"""The planned linear layers of a model: found, compared with the plan, and replaced."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ks.errors import UsageError, one_line
from ks.files.globs import find_weight
from ks.files.weights import DTYPES, Weight
from ks.layer import KSLinear
from ks.model.linears import Linear, linears_of, unwrapped
from ks.model.model_plan import LayerPlan, ModelPlan


@dataclass(frozen=True)
class Place:
    """One planned weight in a model.

    Args:
        plan: of the weight.
        linears: every layer that uses it, the planned one first; several if the weight is tied.
        names: of these layers in this order; a layer may have several.
    """

    plan: LayerPlan
    linears: tuple[Linear, ...]
    names: tuple[str, ...]

    @property
    def weight(self) -> torch.Tensor:
        """W, shape (m, n)."""
        return stored_weight(self.linears[0])


def stored_weight(linear: Linear) -> torch.Tensor:
    """Return W of shape (m, n), a view of the parameter, which Conv1D keeps as (n, m)."""
    weight = linear.module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().t() if linear.transposed else weight.detach()


def find_places(model: nn.Module, plan: ModelPlan) -> list[Place]:
    """Return the places of all planned weights in a model, after comparing them with the plan.

    A weight of the plan may have one or two components more or less before its name than the model gives it.

    Args:
        model: with nn.Linear layers, or Conv1D layers of transformers.
        plan: made for a checkpoint of this model. Its hashes are those of the dtype of the checkpoint; a model that
            holds the same values in a wider dtype fits.
    Raises:
        UsageError: the model lacks a weight of the plan, has another one, or uses it outside its linear layers.
    """
    model = unwrapped(model)
    linears = linears_of(model)
    key_of = {linear.key: name for name, linear in linears.items()}
    places = []
    for layer in plan.layers:
        keys = [find_weight(key_of, key, "the model", "linear layer") for key in (layer.layer, *layer.shared_with)]
        planned = [linears[key_of[key]] for key in keys]
        weights = [linear.module.weight for linear in planned]
        using = [linear for linear in linears.values() if any(linear.module.weight is weight for weight in weights)]
        users = tuple({linear.module: linear for linear in (*planned, *using)}.values())
        names = tuple(name for user in users for name, linear in linears.items() if linear.module is user.module)
        for linear in users:
            _check_planned(layer, linear)
        places.append(Place(layer, users, names))
    _check_ties(places)
    _check_users(model, places)
    return places


def _check_planned(layer: LayerPlan, linear: Linear) -> None:
    """Compare a weight of the model with its plan."""
    where = f"{one_line(linear.key)} of the model"
    parameter = linear.module._parameters.get("weight")
    if parameter is None:
        raise UsageError(f"{where} is computed from other parameters; remove its parametrization, or leave it out")
    if parameter.is_meta:
        raise UsageError(f"{where} is a meta tensor without values; load the checkpoint into the model first")
    weight, planned = stored_weight(linear), (layer.rows, layer.cols)
    if tuple(weight.shape) != planned:
        advice = "plan it with --transpose" if planned == tuple(weight.t().shape) else "make a plan for this model"
        raise UsageError(f"{where} has shape {tuple(weight.shape)}, the plan is for {planned}; {advice}")
    if not _has_hash(weight, layer.weight_sha256):
        raise UsageError(
            f"{where} has other values than the weight that the plan was made for (hash {layer.weight_sha256[:12]}…); "
            "load the checkpoint of the plan, in its dtype or a wider one, or make a plan for this model"
        )


def _has_hash(weight: torch.Tensor, sha256: str) -> bool:
    """Return whether a weight, or the same values in a narrower dtype, has this hash."""
    narrower = [dtype for dtype in DTYPES.values() if dtype.itemsize < weight.dtype.itemsize]
    for dtype in (weight.dtype, *narrower):
        stored = weight.to(dtype)
        if torch.equal(stored.to(weight.dtype), weight) and Weight(stored.cpu(), None).sha256() == sha256:
            return True
    return False


def _check_ties(places: Iterable[Place]) -> None:
    """Check that no layer of the model belongs to two places."""
    place_of: dict[nn.Module, Place] = {}
    for place in places:
        for linear in place.linears:
            if (other := place_of.setdefault(linear.module, place)) is not place:
                raise UsageError(
                    f"{one_line(other.plan.layer)} and {one_line(place.plan.layer)} share a weight in the model, and "
                    "the plan has a chain for each; make a plan for this model (ks.plan_model), whose layers are tied"
                )


def _check_users(model: nn.Module, places: Iterable[Place]) -> None:
    """Check that nothing but the layers of a place uses a weight that is to be replaced."""
    replaced = [place for place in places if place.plan.chain is not None]
    layers = {linear.module: place for place in replaced for linear in place.linears}
    weights = {linear.module.weight: place for place in replaced for linear in place.linears}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in layers:
            raise UsageError(
                f"{one_line(path)} is an nn.MultiheadAttention, which uses the weight of its out_proj without calling "
                "it; leave it out of the plan"
            )
        for parameter in module.parameters(recurse=False):
            if module not in layers and parameter in weights:
                raise UsageError(
                    f"{one_line(weights[parameter].plan.layer)} is also the weight of {one_line(path)}, a "
                    f"{type(module).__name__}, which would keep it in full; leave it out of the plan"
                )


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
