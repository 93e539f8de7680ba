"""Apply a plan to a model: find its planned linear layers and replace them by chains, factorised or trained."""

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ks.errors import UsageError, one_line
from ks.files.globs import find_weight
from ks.files.layout import layer_folder, run_files
from ks.files.weights import DTYPES, tensors_sha256
from ks.layer import KSLinear
from ks.model.layer_plan import LayerPlan
from ks.model.linears import Linear, linears_of, refusals, replace_modules, unwrapped
from ks.model.model_plan import ModelPlan
from ks.moments.metric import LossMetric, Metric
from ks.moments.moments_file import InputMoments, as_moments
from ks.moments.read import inputs_of


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
        return self.linears[0].weight


def compress(
    model: nn.Module,
    plan,
    *,
    moments=None,
    impl: str = "auto",
    quiet: bool = False,
) -> nn.Module:
    """Replace the planned linear layers of a model by chains y = x K_Lᵀ … K_1ᵀ + b with the bias b that they had.

    All chains are made before the first layer is replaced, so that an error leaves the model as it is. Layers that
    share a planned weight share its chain. Layers that the plan keeps dense are not touched.

    Args:
        model: with the values of the checkpoint that the plan was made for; its planned layers are replaced in place.
        plan: a `ks.model.model_plan.ModelPlan` or its file PREFIX_plan.json, to factorise the weights without
            training; or the results folder of a sweep over a checkpoint, to take its trained chains
            (LAYER/rank_R/rank_R_best.pth beside PREFIX_plan.json).
        moments: an `InputMoments` or its file, needed for a plan that was made for measured inputs: the chains are
            then made for the same inputs, and in a plan by the loss of the model for the same gradients.
        impl: backend of the chains, 'auto', 'triton' or 'bmm'.
        quiet: whether to omit the lines on stderr, one for each layer.
    Returns:
        the model; the new layer, if the model is itself a planned one.
    Raises:
        UsageError: the plan is for another checkpoint, moments are missing, not needed or not those of the plan, or a
            trained chain is missing or not the planned one.
    """
    folder = None
    if not isinstance(plan, ModelPlan):
        path = Path(plan)
        if path.is_dir():
            folder, path = path, _plan_in(path)
        plan = ModelPlan.load(path)
    if moments is not None and folder is not None:
        raise UsageError(f"trained chains of {folder} need no moments; leave them out")
    if moments is not None and not any(layer.inputs_sha256 for layer in plan.layers if layer.chain is not None):
        raise UsageError("the plan is for isotropic inputs and needs no moments; leave them out, or plan with them")
    given, places = as_moments(moments), find_places(model, plan)
    replacements: dict[nn.Module, KSLinear] = {}
    for number, place in enumerate(places, 1):
        if not quiet:
            print(f"{number} of {len(places)}, {described(place)}", file=sys.stderr)
        if place.plan.chain is None:
            continue
        if folder is not None:
            chain = _trained(place, folder, impl)
        else:
            metric = metric_of(place.plan, given, plan.loss_metric)
            chain = KSLinear.from_dense(place.weight, patterns=place.plan.patterns, metric=metric, impl=impl)
        replacements |= replacements_of(place, chain)
    return replace_modules(model, replacements)


def _plan_in(folder: Path) -> Path:
    found = sorted(folder.glob("*_plan.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"{folder} should hold one plan, PREFIX_plan.json; it holds {names}")
    return found[0]


def metric_of(layer: LayerPlan, moments: InputMoments | None, loss_metric: LossMetric) -> Metric | None:
    """Return the metric that a layer was planned in, None for isotropic inputs."""
    if layer.inputs_sha256 is None:
        return None
    if moments is None:
        raise UsageError(f"the plan of {one_line(layer.layer)} is for measured inputs; give their moments")
    given = inputs_of(moments, layer.cols, layer.layer)
    if given.sha256 != layer.inputs_sha256:
        raise UsageError(
            f"the moments of the inputs of {one_line(layer.layer)} (hash {given.sha256[:12]}…) are not those of the "
            f"plan ({layer.inputs_sha256[:12]}…); give the moments that the plan was made with, or plan anew"
        )
    missing = given.gradients is None or given.gradients_sha256 != layer.gradients_sha256
    if loss_metric is LossMetric.MODEL_LOSS and missing:
        raise UsageError(
            f"the gradients at the outputs of {one_line(layer.layer)} are missing or not those of the plan; give the "
            "moments that the plan was made with, or plan anew"
        )
    return given.metric(loss_metric)


def _trained(place: Place, folder: Path, impl: str) -> KSLinear:
    """Return the trained chain of a place, with the bias that `--fit_bias` gave it or none."""
    layer = place.plan
    assert layer.rank is not None
    path = run_files(layer_folder(folder, layer.layer), layer.rank, None, None).best
    chain = KSLinear.load(path, impl=impl)
    if chain.patterns != layer.patterns:
        planned = f"{layer.family} of rank {layer.rank}, {layer.rows} × {layer.cols}"
        raise UsageError(f"{path} is another chain than the planned one ({planned}); train the plan of this folder")
    return chain.to(place.weight)


def described(place: Place) -> str:
    """Return the layer of a place and its chain in one line."""
    layer, others = place.plan, [one_line(name) for name in place.names[1:]]
    change = "stays dense" if layer.chain is None else f"{layer.chain.describe()}, rank {layer.rank}"
    shared = f", shared with the tied {', '.join(others)}" if others else ""
    return f"layer {one_line(place.names[0])}: {change}{shared}"


def replacements_of(place: Place, chain: KSLinear) -> dict[nn.Module, KSLinear]:
    """Return the new layer for each layer of a place, with the factors of a chain and the bias of the layer."""
    extra, parameter = chain.bias, place.linears[0].module.weight
    assert isinstance(parameter, nn.Parameter)
    for block in chain.blocks:
        block.requires_grad_(parameter.requires_grad)
    made: dict[nn.Module, KSLinear] = {}
    for linear in place.linears:
        twin = copy.deepcopy(chain, {id(block): block for block in chain.blocks}) if made else chain
        own = linear.module._parameters.get("bias")
        twin.bias = own if extra is None else extra
        if own is not None and extra is not None:
            total = own.detach().double() + extra.detach().double()
            twin.bias = nn.Parameter(total.to(own.dtype), own.requires_grad)
        twin.stored_transposed = linear.transposed
        twin.train(linear.module.training)
        for name, hooks in vars(linear.module).items():
            if name.startswith(("_forward", "_backward")) and "hooks" in name:
                setattr(twin, name, hooks)
        made[linear.module] = twin
    return made


def find_places(model: nn.Module, plan: ModelPlan) -> list[Place]:
    """Return the places of all planned weights in a model, after comparing them with the plan.

    A weight of the plan may have up to three components more or less before its name than the model gives it.

    Args:
        model: with nn.Linear layers, or Conv1D layers of transformers.
        plan: made for a checkpoint of this model. Its hashes are those of the dtype of the checkpoint; a model that
            holds the same values in a wider dtype fits.
    Raises:
        UsageError: the model lacks a weight of the plan, has another one, or a layer that is more than a linear one.
    """
    model = unwrapped(model)
    linears = linears_of(model)
    refused = refusals(model)
    by_key = {linear.key: linear for linear in linears.values()}
    places: list[Place] = []
    planned_by: dict[nn.Module, LayerPlan] = {}
    for layer in plan.layers:
        keys = [find_weight(by_key, key, "the model", "linear layer") for key in (layer.layer, *layer.shared_with)]
        planned = [by_key[key] for key in keys]
        weights = [linear.module.weight for linear in planned]
        using = [linear for linear in linears.values() if any(linear.module.weight is weight for weight in weights)]
        users = tuple({linear.module: linear for linear in (*planned, *using)}.values())
        names = tuple(name for user in users for name, linear in linears.items() if linear.module is user.module)
        for linear in users:
            _check_planned(layer, linear, refused)
            if (other := planned_by.setdefault(linear.module, layer)) is not layer:
                raise UsageError(
                    f"{one_line(other.layer)} and {one_line(layer.layer)} share a weight in the model, and the plan "
                    "has a chain for each; make a plan for this model (ks.plan_model), whose layers are tied"
                )
        places.append(Place(layer, users, names))
    return places


def _check_planned(layer: LayerPlan, linear: Linear, refused: Mapping[str, str]) -> None:
    """Compare a weight of the model with its plan; `refused` is that of `ks.model.linears.refusals`."""
    where = f"{one_line(linear.key)} of the model"
    if layer.chain is not None and linear.key in refused:
        raise UsageError(f"{where} cannot be replaced by a chain: {refused[linear.key]}; leave it out of the plan")
    if linear.weight.is_meta:
        raise UsageError(f"{where} is a meta tensor without values; load the checkpoint into the model first")
    weight, planned = linear.weight, (layer.rows, layer.cols)
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
    stored = (weight.to(dtype) for dtype in (weight.dtype, *narrower))
    return any(torch.equal(same.to(weight.dtype), weight) and tensors_sha256(same.cpu()) == sha256 for same in stored)
