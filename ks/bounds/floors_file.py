"""Floors that were computed before, kept in a file, so that later questions about the same weights take seconds."""

import dataclasses
import time
import zipfile
from pathlib import Path

import numpy as np

from ks.bounds.layer_floors import LayerFloors
from ks.chain.patterns import Chain
from ks.files.atomic import atomic_path

METHOD = 1  # raised whenever floors are computed in another way, so that older ones are not believed
SAVING_SHARE = 0.05  # of the time is spent on writing the whole file again while floors are added
PARTS = ("lower", "upper", "known", "energy")


class FloorsFile:
    """The floors in a file; an entry is found by hash of weight and inputs, and by the splits of the chain.

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

    def find(self, weight_sha256: str, inputs_sha256: str | None, chain: Chain) -> LayerFloors | None:
        """Return the floors of a family on a weight; None if they are not in the file."""
        name = _name(weight_sha256, inputs_sha256, chain)
        found = [self._arrays[f"{name} {part}"] for part in PARTS if f"{name} {part}" in self._arrays]
        if len(found) < len(PARTS) or not _is_valid(*found):
            return None
        lower, upper, known, energy = found
        return LayerFloors(chain, lower, upper, known, float(energy))

    def add(self, weight_sha256: str, inputs_sha256: str | None, floors: LayerFloors) -> None:
        """Keep floors; `save` writes them."""
        self._changed = True
        name = _name(weight_sha256, inputs_sha256, floors.chain)
        self._arrays |= {f"{name} {part}": np.asarray(getattr(floors, part)) for part in PARTS}

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
            self._due = now + (now - started) / SAVING_SHARE


def _name(weight_sha256: str, inputs_sha256: str | None, chain: Chain) -> str:
    return " ".join(map(str, (METHOD, weight_sha256, inputs_sha256, *dataclasses.astuple(chain))))


def _is_valid(lower: np.ndarray, upper: np.ndarray, known: np.ndarray, energy: np.ndarray) -> bool:
    """Return whether arrays are bounds as `LayerFloors` describes them."""
    shapes = lower.ndim == upper.ndim == known.ndim == 1 and len(lower) == len(upper) >= 1
    kinds = lower.dtype == upper.dtype == energy.dtype == np.float64 and known.dtype.kind == "i"
    if not shapes or not kinds or energy.shape != ():
        return False
    return bool(((lower >= 0) & (lower <= upper) & (upper <= 1)).all() and 0 < energy < np.inf)
