"""The resume state of a run: what is kept of it in PREFIX_resume.pth, and how it is put back.

The file stays when a run has ended, so that more epochs continue it. They are a new segment: the optimizer keeps its
state, and a cosine schedule takes the rate that it would have at this epoch of the new total.
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
from ks.training.run_state import changes, settings_in
from ks.training.schedule import Schedule


class ResumeState:
    """The state to resume from, written at the end of an epoch as often as this takes at most 2% of the time.

    Args:
        files: of the run.
        settings: of the run; a state with other settings is ignored.
        resume: whether to read the state on disk; `found` is its content, or None.

    `segment` is the number of the segment that is trained.
    """

    segment = 1

    def __init__(self, files: RunFiles, settings: dict, resume: bool):
        self.files, self.settings = files, settings
        self.found: CheckpointRecord | None = self._read() if resume and files.resume.exists() else None
        self.latest: dict | None = None
        self.next_write = 0.0

    def _read(self) -> CheckpointRecord | None:
        try:
            content = read_torch_file(self.files.resume, "a resume state")
            if isinstance(content, dict) and "optimiser" in content:  # of version 0.1.0
                content["optimizer"] = content.pop("optimiser")
            found = convert(content, CheckpointRecord, f"resume state {self.files.resume}")
        except UsageError as error:
            note(f"{error}; training starts anew")
            return None
        return None if changes(settings_in(found.settings, None), self.settings) else found

    def offer(
        self, threads: int, curves: list[dict], optimizer: Optimizer, schedule: Schedule, best: BestModel
    ) -> None:
        """Keep the state at the end of an epoch on its device, and write it if that is due."""
        self.latest = {
            "settings": self.settings,
            "threads": threads,
            "curves": [dict(row) for row in curves],
            "optimizer": [tensor.detach().clone() for tensor in optimizer.state()],
            "schedule": schedule.state(),
            "best": best.state(),
        }
        if time.monotonic() >= self.next_write:
            self.write_latest()

    def write_latest(self) -> None:
        """Write the last epoch that was offered, unless it is on disk."""
        if self.latest is not None:
            started = time.monotonic()
            on_host = {"optimizer": [tensor.cpu() for tensor in self.latest["optimizer"]]}
            save_tensors(self.latest | on_host, self.files.resume)
            self.latest, ended = None, time.monotonic()
            self.next_write = ended + 50 * (ended - started)

    @torch.no_grad()
    def restore(self, optimizer: Optimizer, schedule: Schedule, best: BestModel) -> list[dict]:
        """Put the found state back and return the curves so far; without a state that fits, no curves."""
        found = self.found
        if found is None:
            return []
        if not self._fits(found, optimizer, best):
            note(f"resume state {self.files.resume} is not valid: its tensors are those of another run; starting anew")
            return []
        for tensor, value in zip(optimizer.state(), found.optimizer, strict=True):
            tensor.copy_(value)
        schedule.restore(found.schedule)
        longer = found.settings["num_epochs"] != self.settings["num_epochs"]
        self.segment = found.curves[-1].get("segment", 1) + longer
        best.restore(found.best, found.curves)
        return found.curves

    def _fits(self, found: CheckpointRecord, optimizer: Optimizer, best: BestModel) -> bool:
        """Return whether a state has the shapes, epochs and rank of this run."""
        pairs = ((found.optimizer, optimizer.state()), (found.best.factors, best.kept.factors))
        shapes = all([value.shape for value in kept] == [tensor.shape for tensor in now] for kept, now in pairs)
        rows = [(row["epoch"], row["rank"]) for row in found.curves]
        whole = rows == [(epoch, self.files.rank) for epoch in range(1, len(rows) + 1)]
        return shapes and whole and found.best.epoch <= len(rows)
