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
from ks.model.apply import check_count, described, factorised, replacements_of
from ks.model.collect import collect_input_moments
from ks.model.model_plan import ModelPlan
from ks.model.places import Place, find_places, replace_modules
from ks.moments.moments_file import InputMoments
from ks.moments.read import inputs_of
from ks.moments.second_moment import SecondMoment


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
    places = find_places(model, plan)
    planned = [place for place in places if place.plan.chain is not None]
    replaced: dict[nn.Module, KSLinear] = {}
    result = model
    try:
        for names in _passes(model, planned, batches[:1], mask, max_passes):
            moments = _moments(model, batches, names, mask)
            found = [place for place in planned if place.names[0] in names]
            new: dict[nn.Module, KSLinear] = {}
            for place in found:
                if not quiet:
                    print(f"{len(replaced) + len(new) + 1} of {len(planned)}: {described(place)}", file=sys.stderr)
                given = inputs_of(moments, place.plan.cols, f"{place.names[0]}.weight".lstrip("."))
                moment = SecondMoment(given.train.second_moment)
                new |= replacements_of(place, partial(factorised, moment=moment, impl=impl))
            result = replace_modules(result, new)
            replaced |= new
    except BaseException:
        replace_modules(model, {new: linear for linear, new in replaced.items()})
        raise
    check_count(plan, places, replaced)
    return result


def _passes(
    model: nn.Module, places: list[Place], batches: list[Any], mask: Any, max_passes: int | None
) -> list[list[str]]:
    """Return the names of the layers that each pass measures, in the order in which the model calls them."""
    if not places:
        return []
    names = [place.names[0] for place in places]
    called = _moments(model, batches, names, mask).aliases
    keys = {f"{name}.weight".lstrip("."): name for name in names}
    if missing := [name for key, name in keys.items() if key not in called]:
        raise UsageError(f"the first batch does not call {one_line(', '.join(missing), 300)}; leave it out of the plan")
    groups: dict[str, list[str]] = {}
    for key, group in called.items():
        groups.setdefault(group, []).append(keys[key])
    ordered = list(groups.values())
    count = min(max_passes or len(ordered), len(ordered))
    bounds = [len(ordered) * index // count for index in range(count + 1)]
    return [list(chain.from_iterable(ordered[start:stop])) for start, stop in pairwise(bounds)]


def _moments(model: nn.Module, batches: list[Any], names: list[str], mask: Any) -> InputMoments:
    return collect_input_moments(model, batches, names, mask=mask, held_out=0, quiet=True)
