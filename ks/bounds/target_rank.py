"""The smallest rank that can reach a target loss, and ranks around it that show where it is reached."""

from collections.abc import Callable

from ks.bounds.floors import floor_of
from ks.bounds.plan import Plan


def smallest_ranks(plan: Plan, target: float) -> tuple[int, int]:
    """Return the smallest rank whose lower bound, and the smallest whose upper bound, is at most `target`.

    No smaller rank than the first can reach the target, and the second does. They are equal where the first one has an
    exact floor, as for two factors and uncoupled inputs. Both bounds are 0 at saturation. The optimum falls with the
    rank, so a rank whose lower bound is above the target excludes all smaller ones; ranks are bisected, and each bound
    is computed for about log2(saturation rank) ranks.

    Args:
        plan: of a family with a floor.
        target: loss relative to predicting 0, in (0, 1).
    """
    assert plan.bounds is not None
    saturation = plan.chain.saturation_rank
    first = int((plan.bounds.curve <= target).nonzero()[0].clamp(min=1))
    lower = _first_below(plan.bounds.lower, target, first, saturation)
    exact = floor_of(plan.bounds, plan.chain, lower).exact
    return lower, lower if exact else _first_below(plan.bounds.upper, target, lower, saturation)


def _first_below(bound: Callable[[int], float], target: float, low: int, high: int) -> int:
    """Return the smallest rank in low … high whose bound is at most `target`; the bound falls and ends below it."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) <= target else (middle + 1, high)
    return low


def ranks_around(plan: Plan, target: float) -> list[int]:
    """Return a quarter, half, once and twice the smallest rank that can reach a target, up to saturation.

    Args:
        plan, target: as in `smallest_ranks`.
    """
    lower, upper = smallest_ranks(plan, target)
    wanted = {lower // 4, lower // 2, lower, 2 * lower, upper}
    return sorted({min(rank, plan.chain.saturation_rank) for rank in wanted if rank > 0})
