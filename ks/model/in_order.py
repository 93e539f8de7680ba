"""Sequential calibration: every layer is compressed for the inputs that the compressed layers before it give."""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import nn

from ks.errors import UsageError, one_line
from ks.layer import KSLinear
from ks.model.apply import described, factorised, find_places, replacements_of
from ks.model.collect import collect_input_moments
from ks.model.linears import replace_modules
from ks.model.model_plan import ModelPlan
from ks.moments.metric import Metric
from ks.moments.moments_file import InputMoments
from ks.moments.read import inputs_of


def compress_in_order(
    model: nn.Module,
    plan,
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], torch.Tensor | None] | None = None,
    max_passes: int | None = None,
    impl: str = "auto",
    quiet: bool = False,
) -> nn.Module:
    """Replace the planned layers in the order in which the model calls them, each made for its inputs at that moment.

    `compress` makes all chains for the inputs of the dense model. Here the layers behind a chain see x̃, the inputs that
    the chains before them cause, and minimise E‖(W − Ŵ) x̃‖²: the target stays W x̃. Chains and ranks are those of the
    plan, whatever inputs it was made for.

    A group is the layers with one input tensor. All batches pass through the model once for each group, or fewer times
    with `max_passes`: then neighbouring groups are measured in the same pass, before any of them is replaced.

    Args:
        model, plan, impl, quiet: as in `ks.compress`; a plan or its file.
        batches: that all passes use, as in `ks.collect_input_moments`.
        mask: of the tokens that count, as in `ks.collect_input_moments`.
        max_passes: at least 1; with 1, the chains are those for the inputs of the dense model. None for one per group.
    Returns:
        the model; the new layer, if the model is itself a planned one.
    Raises:
        UsageError: as `ks.compress` and `ks.collect_input_moments`, or no batch calls a planned layer. The model is
            then as it was.
    """
    plan = plan if isinstance(plan, ModelPlan) else ModelPlan.load(plan)
    batches = list(batches)
    if max_passes is not None and max_passes < 1:
        raise UsageError(f"max_passes {max_passes}: at least 1 is needed")
    planned = {place.names[0]: place for place in find_places(model, plan) if place.plan.chain is not None}
    if not planned:
        return model
    collect = partial(collect_input_moments, model, mask=mask, held_out=0, quiet=True)
    groups = _groups(collect(batches[:1], [*planned]), [*planned])
    passes = min(max_passes or len(groups), len(groups))
    bounds = [len(groups) * index // passes for index in range(passes + 1)]
    replaced: dict[nn.Module, KSLinear] = {}
    result = model
    try:
        for names in (list(chain.from_iterable(groups[start:stop])) for start, stop in pairwise(bounds)):
            moments = collect(batches, names)
            new: dict[nn.Module, KSLinear] = {}
            for name, place in planned.items():
                if name not in names:
                    continue
                if not quiet:
                    print(f"{len(replaced) + len(new) + 1} of {len(planned)}: {described(place)}", file=sys.stderr)
                given = inputs_of(moments, place.plan.cols, _key_of(name))
                metric = Metric(given.train.second_moment)
                new |= replacements_of(place, partial(factorised, metric=metric, impl=impl))
            result = replace_modules(result, new)
            replaced |= new
    except BaseException:
        replace_modules(model, {new: linear for linear, new in replaced.items()})
        raise
    return result


def _groups(moments: InputMoments, names: list[str]) -> list[list[str]]:
    """Return the names of the layers with one input tensor, in the order in which the model calls them."""
    name_of = {_key_of(name): name for name in names}
    if missing := [name for key, name in name_of.items() if key not in moments.aliases]:
        raise UsageError(f"the first batch does not call {one_line(', '.join(missing), 300)}; leave it out of the plan")
    groups: dict[str, list[str]] = {}
    for key, group in moments.aliases.items():
        groups.setdefault(group, []).append(name_of[key])
    return list(groups.values())


def _key_of(name: str) -> str:
    """Return the key of the weight of a layer; a model that is itself a layer has the name ''."""
    return f"{name}.weight".lstrip(".")
