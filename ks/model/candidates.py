"""Compute the floors of all chain families on all weights, several layers at a time."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ks.bounds.floors import no_floor_reason
from ks.bounds.floors_file import FloorsFile
from ks.bounds.layer_floors import LayerFloors, layer_floors
from ks.chain.patterns import Chain
from ks.errors import UsageError, one_line
from ks.files.columns import PLAN, Column, Loss, chosen
from ks.files.table import table
from ks.model.layer_weights import LayerWeight
from ks.model.model_plan import LayerPlan
from ks.moments.moments_file import InputMoments, as_moments
from ks.moments.pieces import one_thread_each
from ks.moments.read import inputs_of, inputs_sha256
from ks.moments.second_moment import SecondMoment

FRACTIONS = (0.1, 0.25, 0.5, 0.75)  # of the dense parameters, at which floors are printed

Report = Callable[[str], None]


@dataclass(frozen=True)
class Candidates:
    """The chain families that may replace one weight: the plan that keeps it dense, and the floors of each family."""

    dense: LayerPlan
    floors: tuple[LayerFloors, ...]

    def plan(self, floors: LayerFloors, rank: int) -> LayerPlan:
        """Return the plan that replaces the weight by the chain of a family and a rank."""
        return dataclasses.replace(
            self.dense,
            chain=floors.chain,
            rank=rank,
            relative_loss=float(floors.upper[rank]),
            relative_loss_lower=float(floors.lower[rank]),
            interpolated=floors.is_interpolated(rank),
        )


def find_candidates(
    weights: Sequence[LayerWeight],
    make: Callable[[int, int, str], Chain],
    chains: Sequence[str],
    moments: InputMoments | str | Path | None = None,
    floors_path: Path | None = None,
    device: torch.device | str = "cpu",
    report: Report = lambda text: None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[Candidates]:
    """Compute the floors of every family on every weight, or take them from a file.

    As many layers at a time as torch has threads, each on one thread; a layer is read when its turn comes. The file is
    written on the way, in at most a twentieth of the time, and at the end, so that the same call resumes.

    Args:
        weights: to plan.
        make: returns the chain of a family for an m × n weight.
        chains: families.
        moments: of the model's inputs, in memory or in a file; None for isotropic inputs.
        floors_path: .npz file in which floors are kept; None keeps none.
        device: on which floors are computed.
        report: called with a line about each layer.
        check_stop: called before every longer computation; an exception from it ends the work.
    Returns:
        one entry for each weight in their order; of tied weights the first alone.
    Raises:
        UsageError: a family without floors, a layer without moments, or moments that do not fit.
    """
    moments = as_moments(moments)
    check_inputs(weights, moments)
    file = FloorsFile(floors_path)
    tied: dict[Hashable, list[str]] = {}
    for weight in weights:
        tied.setdefault(weight.place, []).append(weight.name)
    weights = [weight for weight in weights if tied[weight.place][0] == weight.name]
    found: list[Candidates] = []
    known_before = 0

    @torch.no_grad()  # a thread starts with gradients
    def compute(weight: LayerWeight) -> tuple[Candidates, list[LayerFloors], float]:
        started = time.monotonic()
        check_stop()
        loaded = weight.read()
        rows, cols = loaded.tensor.shape
        families = [make(rows, cols, family) for family in chains]
        for family in families:
            if reason := no_floor_reason(family):
                raise UsageError(f"{one_line(weight.name)}: no floor: {reason}")
        given = None if moments is None else moments.only(weight.name)
        dense = LayerPlan(
            weight.name,
            rows,
            cols,
            loaded.sha256(),
            itemsize=loaded.tensor.element_size(),
            shared_with=tuple(tied[weight.place][1:]),
            inputs_sha256=None if given is None else inputs_sha256(given, weight.name),
        )
        known = {family: file.find(dense.weight_sha256, dense.inputs_sha256, family) for family in families}
        new = {}
        if not all(known.values()):
            moment = SecondMoment.of(None if given is None else inputs_of(given, cols, weight.name).train.second_moment)
            tensor = loaded.tensor.to(device)
            new = {
                family: layer_floors(tensor, family, moment, lambda text: check_stop())
                for family, floors in known.items()
                if floors is None
            }
        complete = tuple(floors for floors in (known | new).values() if floors is not None)
        return Candidates(dense, complete), [*new.values()], time.monotonic() - started

    # one layer at a time on a GPU
    compute_all = one_thread_each if torch.device(device).type == "cpu" else map
    try:
        for number, (entry, new, seconds) in enumerate(compute_all(compute, weights), start=1):
            found.append(entry)
            dense = entry.dense
            if dense.shared_with:
                others = ", ".join(dense.shared_with)
                report(f"{others}: tied to {dense.layer}; planned once, for the inputs of {dense.layer}")
            for floors in new:
                file.add(dense.weight_sha256, dense.inputs_sha256, floors)
            if new:
                file.save_if_due()
                report(f"{number} of {len(weights)}: {dense.layer}, {dense.rows} × {dense.cols}: {seconds:.1f} s")
            else:
                known_before += 1
    finally:
        file.save()
    if known_before:
        report(f"floors of {known_before} layers were computed before")
    return found


def check_inputs(weights: Iterable[LayerWeight], moments: InputMoments | None) -> None:
    """Raise UsageError unless moments hold the inputs of every weight; the message counts those that lack them."""
    if moments is None:
        return
    reasons = []
    for weight in weights:
        try:
            moments.key_of(weight.name)
        except UsageError as error:
            reasons.append(str(error))
    if reasons:
        others = f" ({len(reasons)} layers lack them)" if len(reasons) > 1 else ""
        raise UsageError(f"{reasons[0]}{others}; collect them, or name other layers")


def floors_table(candidates: Sequence[Candidates]) -> str:
    """Return a table of the loss of the best known chains with a tenth, a quarter, … of the dense parameters."""
    sizes = [
        Column(f"at_{fraction:.0%}", Loss, f"loss with {fraction:.0%} of the dense parameters")
        for fraction in FRACTIONS
    ]
    rows = []
    for entry in candidates:
        for floors in entry.floors:
            row = entry.dense.row() | {"chain": floors.chain.family}
            for fraction, column in zip(FRACTIONS, sizes):
                fitting = np.flatnonzero(floors.parameters <= fraction * entry.dense.parameters)
                if len(fitting):
                    rank = int(floors.ranks[fitting[-1]])
                    row[column.name] = f"{'~' * floors.is_interpolated(rank)}{floors.upper[rank]:.2%}"
            rows.append(row)
    return table([*chosen(PLAN, ("layer", "rows", "cols", "chain")), *sizes], rows)
