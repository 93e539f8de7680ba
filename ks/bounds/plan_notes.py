"""The plan in words: saturation, parity with dense, and the rank for a target."""

from ks.bounds.floors import no_floor_reason
from ks.bounds.plan import Plan
from ks.bounds.target_rank import smallest_ranks
from ks.chain.patterns import Chain


def chain_notes(chain: Chain) -> list[str]:
    """Return saturation, parity with dense, and why a chain family has no floor, one sentence each."""
    notes = [f"saturation: from rank {chain.saturation_rank} on, more rank changes nothing"]
    if parity := chain.parity_rank():
        notes.append(f"parity: from rank {parity} on, the chain has as many parameters as the dense weight")
    if reason := no_floor_reason(chain):
        notes.append(f"no floor: {reason}")
    return notes


def plan_notes(plan: Plan, target: float | None = None) -> list[str]:
    """Return the notes on the chain family, and the smallest rank for a target, one sentence each.

    Args:
        plan: of a chain family.
        target: loss relative to predicting 0, or None.
    """
    notes = chain_notes(plan.chain)
    if target is None or plan.bounds is None:
        return notes
    lower, upper = smallest_ranks(plan, target)
    if lower == upper:
        text = f"rank {lower} is the smallest that reaches it"
    else:
        text = f"no rank below {lower} can reach it; the best known chain does at rank {upper}"
    kind = "isotropic" if plan.moment.is_isotropic else "the measured"
    return [*notes, f"target {target:g}, for {kind} inputs: {text}"]
