"""Bounds that were computed before, kept in a file, so that later questions about the same weights take seconds."""

import dataclasses
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ks.bounds.layer_floors import LayerFloors
from ks.bounds.rank_floors import Certified, KnownBounds
from ks.chain.patterns import Chain
from ks.files.atomic import atomic_path

METHOD = 1  # raised whenever floors are computed in another way, so that older ones are not believed
SAVING_FRACTION = 0.05  # of the time is spent on writing the whole file again while floors are added
LAYER_PARTS = ("lower", "upper", "known", "energy", "other", "other_energy")  # the last two only where they are known
CURVES = ("curve", "isotropic", "lowrank")


class FloorsFile:
    """The floors in a file; an entry is found by hash of weight and metric, and by the splits of the chain.

    The hash of a metric is that of the inputs where it is the output energy and no other one is beside it; else it is
    another string that names all that the floors depend on: inputs, gradients, damping, and which metric is beside.

    Whole models keep `LayerFloors` in it, a study of one weight keeps the `KnownBounds` of its ranks.

    Args:
        path: .npz file, which need not exist; one that is damaged counts as empty. None keeps floors in memory.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._changed, self._due = False, 0.0
        self._arrays: dict[str, np.ndarray] = {}
        if path is not None and path.is_file():
            try:
                with np.load(path, allow_pickle=False) as stored:
                    self._arrays = {name: stored[name] for name in stored.files}
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
                self._arrays = {}

    def find(self, weight_sha256: str, metric_sha256: str | None, chain: Chain) -> LayerFloors | None:
        """Return the floors of a family on a weight; None if they are not in the file."""
        name = _name(weight_sha256, metric_sha256, chain)
        parts: dict[str, Any] = {part: self._arrays.get(f"{name} {part}") for part in LAYER_PARTS}
        if not _is_valid(**parts):
            return None
        energies = {part: float(parts[part]) for part in ("energy", "other_energy") if parts[part] is not None}
        return LayerFloors(chain, **parts | energies)

    def add(self, weight_sha256: str, metric_sha256: str | None, floors: LayerFloors) -> None:
        """Keep floors; `save` writes them."""
        self._changed = True
        name = _name(weight_sha256, metric_sha256, floors.chain)
        parts = ((part, getattr(floors, part)) for part in LAYER_PARTS)
        self._arrays |= {f"{name} {part}": np.asarray(value) for part, value in parts if value is not None}

    def find_bounds(self, weight_sha256: str, metric_sha256: str | None, chain: Chain) -> KnownBounds:
        """Return the bounds that are known of the ranks of a family on a weight; empty ones if none are in the file."""
        name = _name(weight_sha256, metric_sha256, chain)
        upper = self._arrays.get(f"{name} upper bounds", np.empty((0, 2)))
        certified = self._arrays.get(f"{name} certified bounds", np.empty((0, 4)))
        if not (_is_table(upper, 2, chain) and _is_table(certified, 4, chain)):
            return KnownBounds()
        known = KnownBounds(
            upper={int(rank): loss for rank, loss in upper.tolist()},
            certified={int(rank): Certified(lower, int(passes), s) for rank, lower, passes, s in certified.tolist()},
        )
        saturation, smaller_side = chain.saturation_rank, min(chain.rows, chain.cols)
        for part, highest in zip(CURVES, (saturation, saturation, smaller_side), strict=True):
            curve = self._arrays.get(f"{name} {part}")
            if curve is not None and not _is_curve(curve, highest):
                return KnownBounds()
            setattr(known, part, None if curve is None else torch.from_numpy(curve))
        return known

    def add_bounds(self, weight_sha256: str, metric_sha256: str | None, chain: Chain, known: KnownBounds) -> None:
        """Keep the bounds that are known of the ranks of a family; `save` writes them."""
        certified = [(rank, *dataclasses.astuple(bound)) for rank, bound in known.certified.items()]
        arrays = {
            "upper bounds": np.array([*known.upper.items()], dtype=np.float64).reshape(-1, 2),
            "certified bounds": np.array(certified, dtype=np.float64).reshape(-1, 4),
        } | {part: curve.numpy() for part in CURVES if (curve := getattr(known, part)) is not None}
        name = _name(weight_sha256, metric_sha256, chain)
        named = {f"{name} {part}": array for part, array in arrays.items()}
        self._changed |= any(not np.array_equal(self._arrays.get(key, ()), array) for key, array in named.items())
        self._arrays |= named

    def save(self) -> None:
        """Write the file atomically, if floors were added.

        Raises:
            OSError: it cannot be written.
        """
        if self.path is not None and self._changed:
            with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **self._arrays)
            self._changed = False

    def save_if_due(self) -> None:
        """Save, unless too little time has passed since the last time for the time that it took."""
        started = time.monotonic()
        if started >= self._due:
            self.save()
            now = time.monotonic()
            self._due = now + (now - started) / SAVING_FRACTION


def _name(weight_sha256: str, metric_sha256: str | None, chain: Chain) -> str:
    return " ".join(map(str, (METHOD, weight_sha256, metric_sha256, *dataclasses.astuple(chain))))


def _is_valid(lower, upper, known, energy, other, other_energy) -> bool:
    """Return whether arrays are bounds as `LayerFloors` describes them; None stands for one that is missing."""
    if any(part is None for part in (lower, upper, known, energy)) or (other is None) != (other_energy is None):
        return False
    curves, energies = [lower, upper], [energy]
    if other is not None:
        curves, energies = [*curves, other], [*energies, other_energy]
    if not all(_is_curve(curve, lower.size - 1) for curve in curves) or not all(map(_is_energy, energies)):
        return False
    if known.ndim != 1 or known.dtype.kind != "i" or not lower.size or energy == 0:
        return False
    return bool(((lower <= upper) & (upper <= 1)).all())


def _is_energy(energy: np.ndarray) -> bool:
    return energy.shape == () and energy.dtype == np.float64 and bool(0 <= energy < np.inf)


def _is_curve(curve: np.ndarray, highest_rank: int) -> bool:
    """Return whether an array holds relative losses of ranks 0 … `highest_rank`."""
    of_kind = curve.shape == (highest_rank + 1,) and curve.dtype == np.float64
    return of_kind and bool(((curve >= 0) & (curve < np.inf)).all())


def _is_table(table: np.ndarray, columns: int, chain: Chain) -> bool:
    """Return whether an array has rows of a rank of the chain and numbers that go with it."""
    if table.ndim != 2 or table.shape[1] != columns or table.dtype != np.float64:
        return False
    ranks = table[:, 0]
    whole = (ranks == ranks.round()) & (ranks >= 1) & (ranks <= chain.saturation_rank)
    return bool(whole.all() and ((table >= 0) & np.isfinite(table)).all())
