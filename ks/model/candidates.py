"""Compute the floors of all chain families on all weights, several layers at a time."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ks.bounds.floors import no_floor_reason
from ks.bounds.floors_file import FloorsFile
from ks.bounds.layer_floors import LayerFloors, layer_floors
from ks.chain.patterns import Chain
from ks.errors import UsageError, one_line
from ks.files.columns import PLAN, Column, Loss, chosen
from ks.files.table import cell, table
from ks.files.weights import NothingToLearn
from ks.model.layer_plan import LayerPlan
from ks.model.layer_weights import LayerWeight, listed
from ks.moments.metric import DAMPING, LossMetric, Metric
from ks.moments.moments_file import InputMoments, as_moments
from ks.moments.pieces import one_thread_each
from ks.moments.read import hashes_of, inputs_of

FRACTIONS = (0.1, 0.25, 0.5, 0.75)  # of the dense parameters, at which floors are printed


@dataclass(frozen=True)
class Candidates:
    """The chain families that may replace one weight: the plan that keeps it dense, and the floors of each family.

    Args:
        dense: plan.
        floors: of each family in `loss_metric`, with the relative losses in the other metric if there are gradients.
        loss_metric: that chains are made for and compared in.
        unit: of the loss of the model; empty without gradients.
        tokens: that the gradients of this layer were measured on.
        most_tokens: of all layers: increases are per token of these, so that those of several layers add up.
    """

    dense: LayerPlan
    floors: tuple[LayerFloors, ...]
    loss_metric: LossMetric = LossMetric.OUTPUT_ENERGY
    unit: str = ""
    tokens: int = 1
    most_tokens: int = 1

    @property
    def _per_token(self) -> float:
        return self.tokens / self.most_tokens / 2

    def losses(self, floors: LayerFloors) -> np.ndarray:
        """Return the loss of the best known chains of ranks 0 … R, a term of the sum over layers that a plan minimises.

        It is the fraction of the output energy that is lost, or the increase of the loss of the model.
        """
        return floors.upper * (floors.energy * self._per_token if self.loss_metric is LossMetric.MODEL_LOSS else 1.0)

    def plan(self, floors: LayerFloors, rank: int) -> LayerPlan:
        """Return the plan that replaces the weight by the chain of a family and a rank."""
        upper, lower = float(floors.upper[rank]), float(floors.lower[rank])
        losses: dict[str, Any] = {"relative_loss": upper, "relative_loss_lower": lower}
        if floors.other is not None and floors.other_energy is not None:
            other = float(floors.other[rank])
            losses |= {"loss_increase": floors.other_energy * self._per_token * other, "loss_increase_lower": None}
            if self.loss_metric is LossMetric.MODEL_LOSS:
                losses = {"relative_loss": other, "relative_loss_lower": None}
                whole = floors.energy * self._per_token
                losses |= {"loss_increase": whole * upper, "loss_increase_lower": whole * lower}
        return dataclasses.replace(
            self.dense, chain=floors.chain, rank=rank, interpolated=floors.is_interpolated(rank), **losses
        )


def find_candidates(
    weights: Sequence[LayerWeight],
    make: Callable[[int, int, str], Chain],
    chains: Sequence[str],
    moments: InputMoments | str | Path | None = None,
    floors_path: Path | None = None,
    device: torch.device | str = "cpu",
    report: Callable[[str], None] = lambda text: None,
    check_stop: Callable[[], None] = lambda: None,
    loss_metric: LossMetric = LossMetric.OUTPUT_ENERGY,
) -> list[Candidates]:
    """Compute the floors of every family on every weight, or take them from a file.

    As many layers at a time as torch has threads, each on one thread; a layer is read when its turn comes. The file is
    written on the way, in at most a twentieth of the time, and at the end, so that the same call resumes.

    Args:
        weights, chains, moments, floors_path, device: as in `ks.plan_model`.
        make: returns the chain of a family for an m × n weight.
        report: called with a line about each layer.
        check_stop: called before every longer computation; an exception from it ends the work.
        loss_metric: of the floors; `check_inputs` has checked that the moments suffice.
    Returns:
        one entry for each weight in their order; of tied weights the first alone. Weights of zeros, and those that are
        not finite, are left out with a line to `report`.
    Raises:
        UsageError: a family without floors, or moments that do not fit.
    """
    moments = as_moments(moments)
    file = FloorsFile(floors_path)
    tied: dict[Hashable, list[str]] = {}
    for weight in weights:
        tied.setdefault(weight.place, []).append(weight.name)
    weights = [weight for weight in weights if tied[weight.place][0] == weight.name]
    found: list[Candidates] = []
    left_out: list[NothingToLearn] = []
    known_before = 0

    @torch.no_grad()  # a thread starts with gradients
    def compute(weight: LayerWeight) -> tuple[Candidates, list[LayerFloors], float] | NothingToLearn:
        started = time.monotonic()
        check_stop()
        try:
            loaded = weight.read()
        except NothingToLearn as nothing:
            return nothing
        rows, cols = loaded.tensor.shape
        families = [make(rows, cols, family) for family in chains]
        for family in families:
            if reason := no_floor_reason(family):
                raise UsageError(f"{one_line(weight.name)}: no floor: {reason}")
        given = inputs = gradients = None
        if moments is not None:
            given = moments.only(weight.name)
            inputs, gradients = hashes_of(given)
        unchanged = None if gradients is None else 0.0
        dense = LayerPlan(
            weight.name,
            rows,
            cols,
            loaded.sha256(),
            itemsize=loaded.tensor.element_size(),
            shared_with=tuple(tied[weight.place][1:]),
            inputs_sha256=inputs,
            loss_increase=unchanged,
            loss_increase_lower=unchanged,
            gradients_sha256=gradients,
        )
        name = _metric_name(dense, loss_metric)
        floors = {family: file.find(dense.weight_sha256, name, family) for family in families}
        missing = [family for family in families if floors[family] is None]
        if missing:
            metric, other = Metric(), None
            if given is not None:
                calibration, [other_metric] = inputs_of(given, cols, weight.name), {*LossMetric} - {loss_metric}
                metric = calibration.metric(loss_metric)
                other = calibration.metric(other_metric) if calibration.gradients else None
            tensor = loaded.tensor.to(device)
            for family in missing:
                floors[family] = layer_floors(tensor, family, metric, lambda text: check_stop(), other)
        counts = [sums.count for sums in given.gradients.values()] if given and gradients else [1]
        unit = moments.unit if moments and gradients else ""
        entry = Candidates(dense, tuple(filter(None, floors.values())), loss_metric, unit, *counts)
        return entry, [each for each in entry.floors if each.chain in missing], time.monotonic() - started

    # one layer at a time on a GPU
    compute_all = one_thread_each if torch.device(device).type == "cpu" else map
    try:
        for number, result in enumerate(compute_all(compute, weights), start=1):
            if isinstance(result, NothingToLearn):
                report(f"left out: {result}")
                left_out.append(result)
                continue
            entry, new, seconds = result
            found.append(entry)
            dense = entry.dense
            if dense.shared_with:
                others = ", ".join(dense.shared_with)
                report(f"{others}: tied to {dense.layer}; planned once, for the inputs of {dense.layer}")
            for floors in new:
                file.add(dense.weight_sha256, _metric_name(dense, loss_metric), floors)
            if new:
                file.save_if_due()
                report(f"{number} of {len(weights)}: {dense.layer}, {dense.rows} × {dense.cols}: {seconds:.1f} s")
            else:
                known_before += 1
    finally:
        file.save()
    if not found:
        raise left_out[0]
    if known_before:
        report(f"floors of {known_before} layers were computed before")
    most = max(entry.tokens for entry in found)
    return [dataclasses.replace(entry, most_tokens=most) for entry in found]


def _metric_name(dense: LayerPlan, loss_metric: LossMetric) -> str | None:
    """Return the name that the metrics of a layer have in the file of the floors."""
    if dense.gradients_sha256 is None:
        return dense.inputs_sha256
    return f"{dense.inputs_sha256} {loss_metric} {dense.gradients_sha256} {DAMPING:g}"


def check_inputs(weights: Iterable[LayerWeight], moments: InputMoments | None, loss_metric: LossMetric) -> None:
    """Raise UsageError unless moments hold what a metric needs of every weight, and are not those of another model.

    The message counts the layers without inputs, and lists the layers without gradients.
    """
    if moments is None:
        return
    reasons, lacking = [], []
    for weight in weights:
        try:
            key = moments.key_of(weight.name)
        except UsageError as error:
            reasons.append(str(error))
            continue
        if (gradients := moments.gradients.get(key)) is None:
            lacking.append(weight.name)
        elif gradients.width != weight.rows:
            raise UsageError(
                f"{moments.source}: gradients of {gradients.width} outputs for {one_line(weight.name)}, which has "
                f"{weight.rows}; give the moments of this model"
            )
    if reasons:
        others = f" ({len(reasons)} layers lack them)" if len(reasons) > 1 else ""
        raise UsageError(f"{reasons[0]}{others}; collect them, or name other layers")
    if lacking and loss_metric is LossMetric.MODEL_LOSS:
        raise UsageError(
            f"{moments.source}: no gradients of the loss of the model for {listed(lacking)}; collect them with loss=… "
            "(ks.collect_input_moments), name other layers, or minimise the output energy"
        )


def floors_table(candidates: Sequence[Candidates]) -> str:
    """Return a table of the loss of the best known chains with a tenth, a quarter, … of the dense parameters."""
    form, legend = "{:.2%}", "the fraction of the output energy that is lost"
    if candidates[0].loss_metric is LossMetric.MODEL_LOSS:
        form, legend = "{:.3g}", f"the predicted increase of the loss of the model per token ({candidates[0].unit})"
    sizes = [
        Column(f"at_{fraction:.0%}", Loss, f"loss with {fraction:.0%} of the dense parameters", form=form)
        for fraction in FRACTIONS
    ]
    sizes[-1] = dataclasses.replace(sizes[-1], legend=f"{legend} with {FRACTIONS[-1]:.0%} of the dense parameters")
    rows = []
    for entry in candidates:
        for floors in entry.floors:
            row = entry.dense.row() | {"chain": floors.chain.family}
            for fraction, column in zip(FRACTIONS, sizes):
                fitting = np.flatnonzero(floors.parameters <= fraction * entry.dense.parameters)
                if len(fitting):
                    rank = int(floors.ranks[fitting[-1]])
                    loss = cell(column, entry.losses(floors)[rank])
                    row[column.name] = "~" * floors.is_interpolated(rank) + loss
            rows.append(row)
    return table([*chosen(PLAN, ("layer", "rows", "cols", "chain")), *sizes], rows)
