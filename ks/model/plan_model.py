"""The plan of a checkpoint or a model in one call: select weights, compute their floors, allocate ranks."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ks.chain.patterns import make_chain
from ks.model.allocate import allocate
from ks.model.candidates import find_candidates
from ks.model.layer_weights import select_weights
from ks.model.model_plan import ModelPlan, Weighting
from ks.moments.moments_file import InputMoments


def plan_model(
    weights: str | Path | Mapping[str, torch.Tensor] | torch.nn.Module,
    layers: str | Sequence[str] = "**",
    *,
    budget: float | None = None,
    target_relative_loss: float | None = None,
    moments: InputMoments | str | Path | None = None,
    chains: Sequence[str] = ("monarch", "lowrank"),
    blocks: int = 4,
    num_factors: int = 3,
    importance: str | Mapping[str, float] = Weighting.EQUAL,
    rank_multiple: int = 1,
    floors_path: str | Path | None = None,
    transpose: bool = False,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> ModelPlan:
    """Choose a chain and a rank for every weight that globs name, or leave it dense; nothing is trained.

    Args:
        weights: a file, the .index.json of a sharded checkpoint, tensors by name, or a model.
        layers: globs over the names of the weights; `*` matches one component of a name, `**` any number of them.
        budget: the largest share of the dense parameters, in (0, 1]; the plan has the least loss.
        target_relative_loss: the largest mean share of the output energy lost; the plan has the fewest parameters.
        moments: of the inputs of these layers (`ks.collect_input_moments`), or their file; None for isotropic inputs.
        chains: families to choose from, best for each layer.
        blocks, num_factors: of the families, as in `ks.make_chain`.
        importance, rank_multiple: as in `ks.model.allocate.allocate`.
        floors_path: .npz file in which floors are kept, so that the next plan takes seconds.
        transpose: weights are stored as (in, out).
        device: on which floors are computed.
        quiet: whether to omit a line for each layer on stderr.
    Raises:
        UsageError: no weight matches, a weight without moments, a budget that no plan meets.
    """

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    selection = select_weights(weights, layers, transpose)
    for note in selection.notes:
        say(note)
    candidates = find_candidates(
        selection.weights,
        lambda rows, cols, family: make_chain(rows, cols, family, blocks=blocks, num_factors=num_factors),
        chains,
        moments,
        None if floors_path is None else Path(floors_path),
        device,
        say,
    )
    return allocate(
        candidates,
        budget=budget,
        target_relative_loss=target_relative_loss,
        importance=importance,
        rank_multiple=rank_multiple,
        checkpoint=selection.source,
    )
