"""Applying a plan to a model: the planned linear layers become chains, factorised or trained."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ks.errors import InternalError, UsageError, one_line
from ks.files.layout import layer_folder, run_files
from ks.layer import KSLinear
from ks.model.model_plan import ModelPlan
from ks.model.places import Place, find_places, replace_modules
from ks.moments.moments_file import InputMoments
from ks.moments.read import inputs_of, read_input_moments
from ks.moments.second_moment import SecondMoment

ChainOf = Callable[[Place], KSLinear]


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
            then made for the same inputs.
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
    if folder is not None and moments is not None:
        raise UsageError(f"trained chains of {folder} need no moments; leave them out")
    if folder is None:
        _check_moments(plan, moments)

    def chain_of(place: Place) -> KSLinear:
        return factorised(place, _inputs(place, moments), impl) if folder is None else _trained(place, folder, impl)

    return apply_chains(model, plan, chain_of, quiet)


def apply_chains(model: nn.Module, plan: ModelPlan, chain_of: ChainOf, quiet: bool = False) -> nn.Module:
    """Replace the planned layers of a model by chains from any source, as `compress` does.

    Args:
        model, plan, quiet: as in `compress`.
        chain_of: returns the chain of a planned weight, with the planned patterns.
    """
    places = find_places(model, plan)
    replacements: dict[nn.Module, KSLinear] = {}
    for number, place in enumerate(places, 1):
        if not quiet:
            print(f"{number} of {len(places)}: {described(place)}", file=sys.stderr)
        replacements |= replacements_of(place, chain_of)
    result = replace_modules(model, replacements)
    check_count(plan, places, replacements)
    return result


def _plan_in(folder: Path) -> Path:
    found = sorted(folder.glob("*_plan.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"{folder} should hold one plan, PREFIX_plan.json; it holds {names}")
    return found[0]


def _check_moments(plan: ModelPlan, moments) -> None:
    measured = [layer.layer for layer in plan.layers if layer.chain is not None and layer.inputs_sha256 is not None]
    if moments is None and measured:
        raise UsageError(f"the plan of {one_line(measured[0])} is for measured inputs; give their moments")
    if moments is not None and not measured:
        raise UsageError("the plan is for isotropic inputs and needs no moments; leave them out, or plan with them")


def _inputs(place: Place, moments) -> SecondMoment | None:
    """Return the inputs that a layer was planned for, None if they are isotropic."""
    layer = place.plan
    if layer.inputs_sha256 is None:
        return None
    if isinstance(moments, InputMoments):
        given = inputs_of(moments, layer.cols, layer.layer)
    else:
        given = read_input_moments(moments, layer.cols, weight_key=layer.layer)
    if given.sha256 != layer.inputs_sha256:
        raise UsageError(
            f"the moments of the inputs of {one_line(layer.layer)} (hash {given.sha256[:12]}…) are not those of the "
            f"plan ({layer.inputs_sha256[:12]}…); give the moments that the plan was made with, or plan anew"
        )
    return SecondMoment(given.train.second_moment)


def factorised(place: Place, moment: SecondMoment | None, impl: str) -> KSLinear:
    """Return the best known chain of a place for inputs, without a bias."""
    layer = place.plan
    assert layer.chain is not None
    assert layer.rank is not None
    patterns = layer.chain.patterns(layer.rank)
    return KSLinear.from_dense(place.weight, patterns=patterns, moment=moment, impl=impl)


def _trained(place: Place, folder: Path, impl: str) -> KSLinear:
    """Return the trained chain of a place, with the bias that `--fit_bias` gave it or none."""
    layer = place.plan
    assert layer.chain is not None
    assert layer.rank is not None
    path = run_files(layer_folder(folder, layer.layer), layer.rank, None, None).best
    chain = KSLinear.load(path, impl=impl)
    if chain.patterns != layer.chain.patterns(layer.rank):
        planned = f"{layer.family} of rank {layer.rank}, {layer.rows} × {layer.cols}"
        raise UsageError(f"{path} is another chain than the planned one ({planned}); train the plan of this folder")
    return chain.to(place.weight)


def described(place: Place) -> str:
    """Return what becomes of a place, in one line."""
    layer, others = place.plan, [one_line(name) for name in place.names[1:]]
    what = "stays dense" if layer.chain is None else f"{layer.chain.describe()}, rank {layer.rank}"
    return f"{one_line(place.names[0])}: {what}" + (f"; once for {', '.join(others)}, tied to it" if others else "")


def replacements_of(place: Place, chain_of: ChainOf) -> dict[nn.Module, KSLinear]:
    """Return the new layer for each layer of a place; none if it stays dense.

    Args:
        place: in the model.
        chain_of: returns the chain of the place.
    """
    if place.plan.chain is None:
        return {}
    chain = chain_of(place)
    extra, parameter = chain.bias, place.linears[0].module.weight
    assert isinstance(parameter, nn.Parameter)
    for block in chain.blocks:
        block.requires_grad_(parameter.requires_grad)
    made: dict[nn.Module, KSLinear] = {}
    for linear in place.linears:
        twin = copy.deepcopy(chain, {id(block): block for block in chain.blocks}) if made else chain
        twin.bias = _with_extra(linear.module._parameters.get("bias"), extra)
        twin.stored_transposed = linear.transposed
        twin.train(linear.module.training)
        made[linear.module] = twin
    return made


def _with_extra(bias: nn.Parameter | None, extra: nn.Parameter | None) -> nn.Parameter | None:
    """Return the bias of a layer, itself, or with the bias of its chain added."""
    if extra is None or bias is None:
        return bias if extra is None else extra
    total = (bias.detach().double() + extra.detach().double()).to(bias.dtype)
    return nn.Parameter(total, bias.requires_grad)


def check_count(plan: ModelPlan, places: list[Place], replacements: dict[nn.Module, KSLinear]) -> None:
    """Count the values of all planned layers in the compressed model, tied ones once.

    Raises:
        InternalError: their number is not that of the plan.
    """
    count = 0
    for place in places:
        chains = [replacements[linear.module] for linear in place.linears if linear.module in replacements]
        values = {block for chain in chains for block in chain.blocks}
        count += sum(block.numel() for block in values) if chains else place.weight.numel()
    if count != plan.parameters:
        raise InternalError(f"the compressed layers have {count} parameters, the plan has {plan.parameters}")
