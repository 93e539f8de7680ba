"""Resuming: the resume state of a run, and how it is put back.

The resume state stays when a run has ended, so that more epochs continue it. They are a new segment: the optimizer
keeps its state, and a cosine schedule takes the rate that it would have at this epoch of the new total.
Partially written files are ignored.
"""

import time

import torch

from ks.cli.console import note
from ks.errors import UsageError
from ks.files.atomic import save_tensors
from ks.files.layout import RunFiles
from ks.files.schema import CheckpointRecord, convert
from ks.files.torch_files import read_torch_file
from ks.training.best_model import BestModel
from ks.training.optimizer import Optimizer
from ks.training.schedule import Schedule
from ks.training.settings import changes, settings_in


class Checkpoints:
    """The checkpoint to resume from, written after an epoch but not more often than every `interval` seconds.

    Args:
        files: of the run.
        settings: of the run; a checkpoint with other settings is ignored.
        interval: seconds.
        resume: whether to read the checkpoint on disk; `found` is its content, or None.

    `segment` is the number of the segment that is trained.
    """

    segment = 1

    def __init__(self, files: RunFiles, settings: dict, interval: float, resume: bool):
        self.files, self.settings, self.interval = files, settings, interval
        self.found: CheckpointRecord | None = self._read() if resume else None
        self.latest: dict | None = None
        self.written = time.monotonic()

    def _read(self) -> CheckpointRecord | None:
        if not self.files.resume.exists():
            return None
        try:
            content = read_torch_file(self.files.resume, "a checkpoint")
            if isinstance(content, dict) and "optimiser" in content:  # of version 0.1.0
                content["optimizer"] = content.pop("optimiser")
            checkpoint = convert(content, CheckpointRecord, f"checkpoint {self.files.resume}")
        except UsageError as error:
            note(f"{error}; training starts anew")
            return None
        return None if changes(settings_in(checkpoint.settings, None), self.settings) else checkpoint

    def offer(
        self, threads: int, curves: list[dict], optimizer: Optimizer, schedule: Schedule, best: BestModel
    ) -> None:
        """Keep the state at the end of an epoch on its device, and write it if the checkpoint on disk is old enough."""
        self.latest = {
            "settings": self.settings,
            "threads": threads,
            "curves": [dict(row) for row in curves],
            "optimizer": [tensor.detach().clone() for tensor in optimizer.state()],
            "schedule": schedule.state(),
            "best": best.state(),
        }
        if time.monotonic() - self.written >= self.interval:
            self.write_latest()

    def write_latest(self) -> None:
        """Write the last epoch that was offered."""
        if self.latest is not None:
            on_host = {"optimizer": [tensor.cpu() for tensor in self.latest["optimizer"]]}
            save_tensors(self.latest | on_host, self.files.resume)
            self.latest, self.written = None, time.monotonic()

    @torch.no_grad()
    def restore(self, optimizer: Optimizer, schedule: Schedule, best: BestModel) -> list[dict]:
        """Put the found state back and return the curves so far; the result is as if the run had not stopped."""
        found = self.found
        if found is None:
            return []
        if not self._fits(found, optimizer, best):
            note(
                f"checkpoint {self.files.resume} is not valid: its tensors are those of another training; starting anew"
            )
            return []
        for tensor, value in zip(optimizer.state(), found.optimizer, strict=True):
            tensor.copy_(value)
        schedule.restore(found.schedule)
        curves = [dict(row) for row in found.curves]
        longer = found.settings["num_epochs"] != self.settings["num_epochs"]
        self.segment = curves[-1].get("segment", 1) + longer
        best.restore(found.best, curves)
        return curves

    def _fits(self, found: CheckpointRecord, optimizer: Optimizer, best: BestModel) -> bool:
        """Return whether a checkpoint has the shapes, epochs and rank of this training."""
        pairs = ((found.optimizer, optimizer.state()), (found.best.factors, best.chain.factors))
        shapes = all([value.shape for value in kept] == [tensor.shape for tensor in now] for kept, now in pairs)
        rows = [(row["epoch"], row["rank"]) for row in found.curves]
        whole = rows == [(epoch, self.files.rank) for epoch in range(1, len(rows) + 1)]
        return shapes and whole and found.best.epoch <= len(found.curves)
