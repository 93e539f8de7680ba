"""Compute the floors of all families on all weights, many layers at a time."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ks.bounds.floors import no_floor_reason
from ks.bounds.floors_file import FloorsFile
from ks.bounds.layer_floors import LayerFloors, layer_floors
from ks.chain.patterns import Chain
from ks.errors import UsageError, one_line
from ks.model.layer_weights import LayerWeight
from ks.moments.moments_file import InputMoments, MomentsFile, find_weight
from ks.moments.pieces import one_thread_each
from ks.moments.read import inputs_of, inputs_sha256
from ks.moments.second_moment import UNIT_MOMENT, SecondMoment

MakeChain = Callable[[int, int, str], Chain]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Candidates:
    """The chain families that may replace one weight W of shape (m, n), with their floors.

    Args:
        layer: name of the weight.
        rows, cols: m and n.
        weight_sha256: hash of W.
        inputs_sha256: hash of the moments of its inputs; None for isotropic ones.
        itemsize: bytes of a value of W.
        floors: of each family.
        shared_with: names of weights that are tied to it.
    """

    layer: str
    rows: int
    cols: int
    weight_sha256: str
    inputs_sha256: str | None
    itemsize: int
    floors: tuple[LayerFloors, ...]
    shared_with: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """tr(W C Wᵀ), the output energy, in the units of the checkpoint."""
        return self.floors[0].energy


def find_candidates(
    weights: Sequence[LayerWeight],
    make: MakeChain,
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
        report: told in a line about each layer.
        check_stop: called before every longer computation; an exception from it ends the work.
    Returns:
        one entry for each weight in their order; of tied weights the first alone.
    Raises:
        UsageError: a family without floors, a layer without moments, or moments that do not fit.
    """
    check_inputs(weights, moments)
    inputs = _InputsOfLayers(moments)
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
        sha256, inputs_sha256 = loaded.sha256(), inputs.sha256(weight.name)
        known = {family: file.find(sha256, inputs_sha256, family) for family in families}
        new = {}
        if not all(known.values()):
            moment, tensor = inputs.second_moment(weight.name, cols), loaded.tensor.to(device)
            new = {
                family: layer_floors(tensor, family, moment, lambda text: check_stop())
                for family, floors in known.items()
                if floors is None
            }
        complete = tuple(floors for floors in (known | new).values() if floors is not None)
        itemsize, others = loaded.tensor.element_size(), tuple(tied[weight.place][1:])
        entry = Candidates(weight.name, rows, cols, sha256, inputs_sha256, itemsize, complete, others)
        return entry, [*new.values()], time.monotonic() - started

    try:
        for number, (entry, new, seconds) in enumerate(_each(compute, weights, device), start=1):
            found.append(entry)
            if entry.shared_with:
                report(f"{', '.join(entry.shared_with)}: tied to {entry.layer}; counted once, with its inputs")
            for floors in new:
                file.add(entry.weight_sha256, entry.inputs_sha256, floors)
            if new:
                file.save_if_due()
                report(f"{number} of {len(weights)}: {entry.layer}, {entry.rows} × {entry.cols}: {seconds:.1f} s")
            else:
                known_before += 1
    finally:
        file.save()
    if known_before:
        report(f"floors of {known_before} layers were computed before")
    return found


def check_inputs(weights: Iterable[LayerWeight], moments: InputMoments | str | Path | None) -> None:
    """Raise UsageError unless moments hold the inputs of every weight; the message counts those that lack them."""
    inputs = _InputsOfLayers(moments)
    if moments is None:
        return
    reasons = []
    for weight in weights:
        try:
            find_weight(inputs.aliases(), weight.name, inputs.where)
        except UsageError as error:
            reasons.append(str(error))
    if reasons:
        others = f" ({len(reasons)} layers lack them)" if len(reasons) > 1 else ""
        raise UsageError(f"{reasons[0]}{others}; collect them, or name other layers")


def _each(compute, weights: Iterable[LayerWeight], device) -> Iterator:
    """Yield compute(weight) for each weight, in order; one at a time on a GPU."""
    return one_thread_each(compute, weights) if torch.device(device).type == "cpu" else map(compute, weights)


class _InputsOfLayers:
    """The inputs of every layer, from moments in memory or a file of them; isotropic without either."""

    def __init__(self, moments: InputMoments | str | Path | None):
        self.moments = moments if moments is None or isinstance(moments, InputMoments) else MomentsFile(moments)
        self.where = "these moments" if isinstance(moments, InputMoments) else str(moments)

    def sha256(self, name: str) -> str | None:
        """Return the hash of the moments of a layer; None for isotropic inputs."""
        return None if self.moments is None else inputs_sha256(self._of(name), name)

    def second_moment(self, name: str, width: int) -> SecondMoment:
        """Return the second moment of the inputs of a layer of n = `width` input features, checked."""
        if self.moments is None:
            return UNIT_MOMENT
        return SecondMoment(inputs_of(self._of(name), width, name).train.second_moment)

    def aliases(self) -> Mapping[str, str]:
        """Return the NAME of the input of every weight that has moments."""
        assert self.moments is not None
        return self.moments.aliases if isinstance(self.moments, InputMoments) else self.moments.record.aliases

    def _of(self, name: str) -> InputMoments:
        """Return moments with at least those of one layer."""
        assert self.moments is not None
        if isinstance(self.moments, InputMoments):
            return self.moments
        found = find_weight(self.aliases(), name, self.where)
        return self.moments.moments({found: self.aliases()[found]})
