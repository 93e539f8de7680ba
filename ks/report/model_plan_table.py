"""The plan of a checkpoint as text: totals in words, one line for each layer, or floors at a few sizes."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from ks.files.columns import PLAN, Column, Loss, chosen
from ks.files.table import table
from ks.model.candidates import Candidates
from ks.model.model_plan import ModelPlan, Objective

SHARES = (0.1, 0.25, 0.5, 0.75)  # of the dense parameters, at which the floors of a layer are printed


def totals(plan: ModelPlan) -> list[str]:
    """Return the answer of a plan in sentences: sizes, loss, and the same share in every layer beside it."""
    uniform, kept = plan.as_uniform(), [layer for layer in plan.layers if layer.chain is None]
    sizes = " of ".join(tqdm.format_sizeof(count, "B") for count in (plan.num_bytes, plan.dense_bytes))
    lower, upper = plan.mean_relative_loss_lower, plan.mean_relative_loss
    at_least = "" if np.isclose(lower, upper, rtol=1e-6) else f" (at least {lower:.2%} with chains of these ranks)"
    sentences = [
        f"The plan keeps {plan.share:.2%} of the parameters of {len(plan.layers)} weights: {plan.parameters:,} of "
        f"{plan.dense_parameters:,}, {sizes}. Biases are not counted. Dense over kept is {1 / plan.share:.2f}.",
        f"The layers lose {upper:.2%} of their output energy on average{at_least}. With the same share in every layer, "
        f"{uniform.share:.2%} of the parameters lose {uniform.mean_relative_loss:.2%}.",
    ]
    if plan.gap >= 1e-4:
        saved = "loss" if plan.objective is Objective.BUDGET else "parameters"
        sentences.append(f"Another choice of these chains could save at most {plan.gap:.2%} of the {saved}.")
    if any(layer.interpolated for layer in plan.layers):
        sentences.append("Losses marked ~ are interpolated between ranks for which a chain is known.")
    if kept:
        sentences.append(
            f"{len(kept)} of {len(plan.layers)} layers stay dense because no chain saves enough "
            "parameters for its loss."
        )
    return sentences


def plan_lines(plan: ModelPlan) -> str:
    """Return a table with one line for each layer; ~ marks an interpolated loss."""
    shown = chosen(PLAN, ("layer", "rows", "cols", "chain", "rank", "parameters", "share", "relative_loss"))
    losses = [f"{'~' * layer.interpolated}{layer.relative_loss:.2%}" for layer in plan.layers]
    return table(shown, [layer.row() | {"relative_loss": loss} for layer, loss in zip(plan.layers, losses)])


def floors_lines(candidates: Sequence[Candidates]) -> str:
    """Return a table of the loss of the best known chains with a tenth, a quarter, … of the dense parameters."""
    sizes = [Column(f"at_{share:.0%}", Loss, f"loss with {share:.0%} of the dense parameters") for share in SHARES]
    rows = []
    for entry in candidates:
        for floors in entry.floors:
            row = {"layer": entry.layer, "rows": entry.rows, "cols": entry.cols, "chain": floors.chain.family}
            for share, column in zip(SHARES, sizes):
                fitting = np.flatnonzero(floors.parameters <= share * entry.rows * entry.cols)
                if len(fitting):
                    rank = int(floors.ranks[fitting[-1]])
                    row[column.name] = f"{'~' * floors.is_interpolated(rank)}{floors.upper[rank]:.2%}"
            rows.append(row)
    return table([*chosen(PLAN, ("layer", "rows", "cols", "chain")), *sizes], rows)
