"""Sequential calibration: every layer is compressed for the inputs that the compressed layers before it give."""

import copy
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import nn

from ks.errors import UsageError, one_line
from ks.layer import KSLinear
from ks.model.apply import described, find_places, metric_of, replacements_of
from ks.model.batches import Mask, call, counted, masks_of, on_device_of
from ks.model.collect import collect_input_moments
from ks.model.hooks import observed
from ks.model.linears import joined, linears_of, replace_modules, unwrapped
from ks.model.model_plan import ModelPlan
from ks.moments.metric import LossMetric, Metric
from ks.moments.moments_file import InputMoments, as_moments
from ks.moments.read import inputs_of
from ks.moments.second_moment import SecondMoment


def compress_in_order(
    model: nn.Module,
    plan,
    batches: Iterable[Any],
    *,
    moments=None,
    anchor: float = 0.0,
    mask: Mask | None = None,
    max_passes: int | None = None,
    impl: str = "auto",
    quiet: bool = False,
) -> nn.Module:
    """Replace the planned layers in the order in which the model calls them, each made for its inputs at that moment.

    `compress` makes all chains for the inputs x of the dense model. Here the layers behind a chain see x̃, the inputs
    that the chains before them cause, and minimise tr(G (T − Ŵ) C (T − Ŵ)ᵀ) with C = E[x̃ x̃ᵀ] and the target

        T = W (I + β (E[x x̃ᵀ] C⁺ − I)),

    x and x̃ of the same token. With β = 0 the target is the output W x̃ for the inputs at hand; with β = 1 it is W x, the
    output of the dense model. Chains and ranks are those of the plan, whatever inputs it was made for. Layers that the
    plan keeps dense are not touched.

    A group is the layers with one input tensor. All batches pass through the model once for each group, or fewer times
    with `max_passes`: then neighbouring groups are measured in the same pass, before any of them is replaced. With
    β > 0 they pass through the dense model too, a copy that shares its tensors, and a group of width n has one more sum
    of n² float64 numbers. C⁺ leaves out eigenvalues below n · 2.2e-16 of the largest.

    Source: AA-SVD (arXiv 2604.02119) for β = 1, SAES-SVD (arXiv 2602.03051) for β between.

    Args:
        model, plan, impl, quiet: as in `ks.compress`; a plan or its file.
        batches: that all passes use, as in `ks.collect_input_moments`.
        moments: an `InputMoments` of the dense model with gradients, or its file, for the G of every planned layer;
            None for G = I, the output energy.
        anchor: β, from 0 to 1.
        mask: of the tokens that count, as in `ks.collect_input_moments`.
        max_passes: at least 1; with 1, the chains are those for the inputs of the dense model. None for one per group.
    Returns:
        the model; the new layer, if the model is itself a planned one.
    Raises:
        UsageError: as `ks.compress` and `ks.collect_input_moments`, no batch calls a planned layer, or with β > 0 a
            layer has other tokens in the dense model. The model is then as it was.
    """
    plan = plan if isinstance(plan, ModelPlan) else ModelPlan.load(plan)
    batches, moments = list(batches), as_moments(moments)
    if max_passes is not None and max_passes < 1:
        raise UsageError(f"max_passes {max_passes}: at least 1 is needed")
    if not 0 <= anchor <= 1:
        raise UsageError(f"an anchor of {anchor}: 0 to 1 is allowed")
    if moments is not None and plan.loss_metric is not LossMetric.MODEL_LOSS:
        raise UsageError("the plan minimises the output energy and needs no moments in order; leave them out")
    planned = {place.names[0]: place for place in find_places(model, plan) if place.plan.chain is not None}
    if not planned:
        return model
    collect = partial(collect_input_moments, model, mask=mask, held_out=0, quiet=True)
    groups = _groups(collect(batches[:1], [*planned]), [*planned])
    passes = min(max_passes or len(groups), len(groups))
    bounds = [len(groups) * index // passes for index in range(passes + 1)]
    dense = None
    if anchor:  # a copy with modules of its own, which shares the tensors
        inside = unwrapped(model)
        dense = copy.deepcopy(inside, {id(tensor): tensor for tensor in (*inside.parameters(), *inside.buffers())})
    replaced: dict[nn.Module, KSLinear] = {}
    result, number = model, 0
    try:
        for several in (groups[start:stop] for start, stop in pairwise(bounds)):
            names = [group[0] for group in several]
            with _paired(dense if replaced else None, model, names, batches, mask) as (given, drifts):
                found = collect(given, [*chain.from_iterable(several)])
            new: dict[nn.Module, KSLinear] = {}
            for group in several:
                inputs = inputs_of(found, planned[group[0]].plan.cols, joined(group[0], "weight")).train
                moment = SecondMoment(inputs.second_moment)
                for name in group:
                    place, number = planned[name], number + 1  # of the places; a tied one has several layers
                    if not quiet:
                        print(f"{number} of {len(planned)}, {described(place)}", file=sys.stderr)
                    target = place.weight
                    if drifts:
                        moved = target.double() @ (drifts[group[0]] / inputs.count).to(target.device)
                        target = target + anchor * moment.times_inverse_root(moment.times_inverse_root(moved))
                    of_plan = None if moments is None else metric_of(place.plan, moments, plan.loss_metric)
                    metric = Metric(moment, of_plan.outputs if of_plan else None, damping=0)  # G was damped before
                    made = KSLinear.from_dense(target, patterns=place.plan.patterns, metric=metric, impl=impl)
                    new |= replacements_of(place, made.to(place.weight))  # rounded at the end
            result = replace_modules(result, new)
            replaced |= new
    except BaseException:
        replace_modules(model, {new: linear for linear, new in replaced.items()})
        raise
    return result


@contextmanager
def _paired(
    dense: nn.Module | None, small: nn.Module, names: list[str], batches: list[Any], mask: Mask | None
) -> Iterator[tuple[Iterable[Any], dict[str, torch.Tensor]]]:
    """Yield batches for a pass through the compressed model, and Σ (x − x̃) x̃ᵀ of layers, complete after the pass.

    A batch goes through the dense model before it is yielded; without a dense model there are no sums.
    """
    drifts: dict[str, torch.Tensor] = {}
    if dense is None:
        yield batches, drifts
        return
    kept: defaultdict[tuple[nn.Module, str], list[torch.Tensor]] = defaultdict(list)  # inputs in every call

    def keep(model: nn.Module, name: str, inputs: torch.Tensor) -> None:
        kept[model, name].append(inputs.clone())

    def passes() -> Iterator[Any]:
        for batch in batches:
            kept.clear()
            call(dense, on_device_of(dense, batch))
            yield batch
            mask_for = masks_of(dense, batch, mask)
            for name in names:
                calls, others = kept[dense, name], kept[small, name]
                if [each.shape for each in calls] != [each.shape for each in others]:
                    raise UsageError(
                        f"layer {one_line(name)} sees other tokens in the compressed model than in the dense one, so "
                        "that they have no pairs; leave it out of the plan, or take anchor 0"
                    )
                for pair in zip(calls, others):
                    place = "cpu" if pair[0].device.type == "mps" else pair[0].device  # MPS has no float64
                    x, seen = (counted(each, mask_for(name)).to(place, torch.float64) for each in pair)
                    drifts[name] = drifts.get(name, 0) + (x - seen).mT @ seen

    def observing(model: nn.Module) -> AbstractContextManager:
        linears = linears_of(model)
        return observed(model, {name: linears[name] for name in names}, partial(keep, model), None)

    with observing(dense), observing(small):
        yield passes(), drifts


def _groups(moments: InputMoments, names: list[str]) -> list[list[str]]:
    """Return the names of the layers with one input tensor, in the order in which the model calls them."""
    name_of = {joined(name, "weight"): name for name in names}
    if missing := [name for key, name in name_of.items() if key not in moments.aliases]:
        raise UsageError(f"the first batch does not call {one_line(', '.join(missing), 300)}; leave it out of the plan")
    groups: dict[str, list[str]] = {}
    for key, group in moments.aliases.items():
        groups.setdefault(group, []).append(name_of[key])
    return list(groups.values())
