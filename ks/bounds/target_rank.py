"""The smallest rank that can reach a target loss, and ranks around it that show where it is reached."""

from ks.bounds.factorize import HierarchicalLoss
from ks.bounds.plan import Plan


def smallest_ranks(plan: Plan, target: float) -> tuple[int, int]:
    """Return the smallest rank whose lower bound, and the smallest whose upper bound, is at most `target`.

    For two factors they are equal: no smaller rank can reach the target, and this one does. Both bounds are 0 at
    saturation.

    Args:
        plan: of a family with a floor.
        target: loss relative to predicting 0, in (0, 1).
    """
    assert plan.curve is not None
    lower = int((plan.curve <= target).nonzero()[0].clamp(min=1))
    if plan.chain.num_splits == 1:
        return lower, lower
    upper_of = HierarchicalLoss(plan.inputs.times_root(plan.weight), plan.chain)
    low, high = lower, plan.chain.saturation_rank
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if upper_of(middle) <= target else (middle + 1, high)
    return lower, low


def ranks_around(plan: Plan, target: float) -> list[int]:
    """Return a quarter, half, once and twice the smallest rank that can reach a target, up to saturation.

    Args:
        plan, target: as in `smallest_ranks`.
    """
    lower, upper = smallest_ranks(plan, target)
    wanted = {lower // 4, lower // 2, lower, 2 * lower, upper}
    return sorted({min(rank, plan.chain.saturation_rank) for rank in wanted if rank > 0})
