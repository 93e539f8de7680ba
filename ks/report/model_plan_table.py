"""The plan of a checkpoint as text: totals in words, one line for each layer, or floors at a few sizes."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from ks.files.columns import PLAN
from ks.model.candidates import Candidates
from ks.model.model_plan import LayerPlan, ModelPlan, Objective
from ks.report.text_table import text_table

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
    """Return a table with one line for each layer."""
    return _table([_line(layer) for layer in plan.layers])


def _line(layer: LayerPlan) -> dict[str, str]:
    mark = "~" if layer.interpolated else ""
    values = layer.row() | {"relative_loss": layer.relative_loss}
    line = {"layer": layer.layer, "shape": f"{layer.rows} × {layer.cols}"}
    for column in PLAN:
        if column.header and column.name in ("chain", "rank", "parameters", "share", "relative_loss"):
            value = values[column.name]
            line[column.header] = "-" if value is None else column.form.format(value)
    header = next(column.header for column in PLAN if column.name == "relative_loss")
    line[str(header)] = mark + line[str(header)]
    return line


def floors_lines(candidates: Sequence[Candidates]) -> str:
    """Return a table of the loss of the best known chains with a tenth, a quarter, … of the dense parameters."""
    lines = []
    for entry in candidates:
        for floors in entry.floors:
            line = {"layer": entry.layer, "shape": f"{entry.rows} × {entry.cols}", "chain": floors.chain.family}
            for share in SHARES:
                fitting = np.flatnonzero(floors.parameters <= share * entry.rows * entry.cols)
                if len(fitting) == 0:
                    line[f"at {share:.0%}"] = "-"
                    continue
                rank = int(floors.ranks[fitting[-1]])
                mark = "~" if floors.is_interpolated(rank) else ""
                line[f"at {share:.0%}"] = f"{mark}{floors.upper[rank]:.2%}"
            lines.append(line)
    return _table(lines)


def _table(lines: list[dict[str, str]]) -> str:
    return text_table({name: [line[name] for line in lines] for name in lines[0]})
