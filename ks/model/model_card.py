"""The model card of a folder, its README.md: the model, its plan with predicted and measured loss, how to load it."""

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ks
from ks.errors import UsageError, one_line
from ks.files.columns import PLAN, chosen
from ks.files.globs import find_weight
from ks.files.table import cell, markdown
from ks.layer import KSLinear
from ks.model.linears import joined
from ks.model.model_plan import ModelPlan
from ks.model.transformers_model import is_of_transformers
from ks.moments.metric import LossMetric

IMPORT = "import ks  # after pip install -e . in a clone of its repository"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def model_card(
    model: nn.Module,
    chains: Mapping[str, KSLinear],
    plan: ModelPlan | None,
    folder: str,
    *,
    with_tokenizer: bool,
    densified: bool,
) -> str:
    """Return the text of a card.

    Args:
        model: that is saved.
        chains: its chains, by the names of their layers.
        plan: of these chains, with the losses that it knows.
        folder: its name, without the folders above it.
        with_tokenizer: whether the folder has one.
        densified: whether the chains are multiplied out in it.
    Raises:
        UsageError: the plan is that of another model.
    """
    name, of_transformers = type(model).__name__, is_of_transformers(model)
    library = ("transformers" if of_transformers else "pytorch") if densified else "ks"
    base = _base_model(model) if of_transformers else ""
    small = sum(parameter.numel() for parameter in model.parameters())
    distinct = {chain.block_0: chain for chain in chains.values()}.values()  # tied layers share one
    saved = sum(chain.out_features * chain.in_features - _values(chain) for chain in distinct)
    size = f"{small:,} of {small + saved:,} parameters ({small / max(1, small + saved):.1%})"
    count = len({*chains.values()})
    layers = "1 linear layer as a chain" if count == 1 else f"{count} linear layers as chains"
    made = f"`{name}` with {layers} of Kronecker-sparse factors: {size}."
    note = " Every chain is multiplied out here, so that this checkpoint has the full size." if densified else ""
    versions = [f"ks {ks.__version__}", f"torch {torch.__version__}"]
    versions += [f"transformers {version('transformers')}"] if of_transformers else []
    parts = [
        f"# {base.split('/')[-1] or name}, compressed",
        made + note,
        _loading(name, of_transformers, json.dumps(folder), with_tokenizer, densified),
        *_plan_text(plan, chains),
        f"Written by {', '.join(versions)}.",
    ]
    front = ["---", f"library_name: {library}", *([f"base_model: {base}"] if base else [])]
    return "\n".join([*front, "tags:", "- kronecker-sparse", "- compression", "---", "", "\n\n".join(parts), ""])


def _base_model(model: Any) -> str:
    """Return where a model comes from, if that is the name of a repository and no path."""
    name = str(model.config.name_or_path)
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else ""


def _loading(name: str, of_transformers: bool, folder: str, with_tokenizer: bool, densified: bool) -> str:
    """Return the lines of Python that load the model, in a fenced block, and their limit; `folder` is quoted."""
    if densified and not of_transformers:
        return f"The tensors are those of a `{name}` with dense layers."
    lines = ["from transformers import AutoTokenizer"] if with_tokenizer else []
    if densified:
        lines += [f"from transformers import {name}", "", f"model = {name}.from_pretrained({folder})"]
    elif of_transformers:
        lines += [IMPORT, "", f"model = ks.load_compressed({folder})"]
    else:
        lines += [IMPORT, "", f"ks.load_compressed(model, {folder})  # a {name} with dense layers and any values"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({folder})"] if with_tokenizer else []
    code = "\n".join(["```python", *lines, "```"])
    if densified or not of_transformers:
        return code
    return f"{code}\n\n`from_pretrained` does not load it: for that, save the model with `densify=True`."


def _plan_text(plan: ModelPlan | None, chains: Mapping[str, KSLinear]) -> list[str]:
    """Return the sentences of a plan and its table; without one, a table of the chains."""
    if plan is None:
        rows = [
            {"layer": name, "rows": chain.out_features, "cols": chain.in_features}
            | {"share": _values(chain) / (chain.out_features * chain.in_features)}
            for name, chain in chains.items()
        ]
        return [_table(("layer", "rows", "cols", "share"), rows)] if rows else []
    keys = {joined(name, "weight"): chain for name, chain in chains.items()}
    for layer in plan.layers:
        if layer.chain is not None:
            key = find_weight(keys, layer.layer, "the model", "chain")
            if keys[key].patterns != layer.patterns:
                raise UsageError(
                    f"{one_line(key)} of the model is another chain than that of the plan; leave out the plan"
                )
    loss = "loss_increase" if plan.loss_metric is LossMetric.MODEL_LOSS else "relative_loss"
    table = _table(("layer", "chain", "rank", "share", loss), plan.marked_rows())
    return ["## The plan", "\n".join(f"- {one_line(sentence, 1000)}" for sentence in plan.sentences()), table]


def _table(names: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    columns = chosen(PLAN, names)
    rows = [row | {"layer": f"`{one_line(row['layer'])}`"} for row in rows]
    cells = [[cell(column, row[column.name]).replace("|", r"\|") for column in columns] for row in rows]
    legends = [f"`{column.name}`: {column.legend}." for column in columns if column.legend]
    return "\n".join([markdown(names, cells), *(["", *legends] if legends else [])])


def _values(chain: KSLinear) -> int:
    """Return the number of values of the factors of a chain."""
    return sum(block.numel() for block in chain.blocks)
