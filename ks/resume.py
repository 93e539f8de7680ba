"""What an earlier run left: is it this run, is it finished, where can it go on? Nothing half-written is believed."""

import time

import torch

from ks import cli, results
from ks.layer import load
from ks.problem import Problem

# What these flags come to is compared (weight, chain, device, sampling), or they only say what is reported and kept.
NOT_COMPARED = (
    *("weight_path", "weight_key", "transpose", "chain", "blocks", "num_factors", "row_splits", "col_splits"),
    *("device", "sampling", "log_interval", "verbose", "quiet", "save_interval", "resume_interval"),
)


def settings_of(config, problem: Problem) -> dict:
    """All that makes the result of a training but the rank: flags, and what the others came to."""
    description = problem.describe()
    settings = {name: value for name, value in cli.shared_settings(config).items() if name not in NOT_COMPARED}
    settings |= {name: description[name] for name in ("chain", "device", "sampling")}
    return results.finite(settings | {"weight": f"sha256 {description['weight']['sha256'][:16]}"})


def changes(before: dict, now: dict) -> str:
    """The settings that differ, named one by one; empty where none does."""
    names = [name for name in now if name not in before or before[name] != now[name]]
    return ", ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in names)


def is_finished(files: results.RunFiles, num_epochs: int) -> bool:
    """Whether a run came to its end and everything it left can be read."""
    log = results.read_json(files.training_log)
    curves = results.curves_if_any(files.curves_csv)
    lists = results.read_json(files.curves_json)
    if not isinstance(log, dict) or log.get("status") != "finished" or not isinstance(lists, dict):
        return False
    epochs = list(range(1, num_epochs + 1))
    if [row["epoch"] for row in curves] != epochs or lists.get("epochs") != epochs:
        return False
    try:
        return all(load(path) is not None for path in (files.final, files.best))
    except ValueError:
        return False


def goes_on(files: results.RunFiles, settings: dict) -> bool:
    """Whether the files are those of an earlier run with these settings that did not diverge.

    Raises:
        ValueError: they are a run's with other settings, each of them named.
    """
    config, log = (results.read_json(path) or {} for path in (files.config, files.training_log))
    before = config.get("settings")
    if before is None:
        return False
    if changed := changes(before, settings):
        raise ValueError(
            f"{files.directory} holds a run with other settings ({changed}); leave out --resume to redo it"
        )
    return log.get("status") != "diverged"


class Checkpoints:
    """Where a run can go on, on disk: after an epoch, but not more often than every `interval` seconds.

    Args:
        files: of the run.
        settings: of the run; a checkpoint of others is not used.
        interval: seconds.
        look: whether to use what is there; `found` is that checkpoint, or None.
    """

    def __init__(self, files: results.RunFiles, settings: dict, interval: float, look: bool):
        self.files, self.settings, self.interval = files, settings, interval
        self.found = self._read() if look else None
        self.latest, self.written = None, time.monotonic()

    def _read(self) -> dict | None:
        try:
            checkpoint = torch.load(self.files.resume, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception:  # a damaged file can raise nearly anything
            cli.note(f"{self.files.resume} cannot be read: starting anew")
            return None
        return checkpoint if checkpoint.get("settings") == self.settings else None

    def offer(self, threads: int, curves: list[dict], optimiser, schedule, best) -> None:
        """Keep the state at the end of an epoch, and write it if the last one on disk is old enough."""
        self.latest = {
            "settings": self.settings,
            "threads": threads,
            "curves": [dict(row) for row in curves],
            "optimiser": [tensor.detach().to("cpu", copy=True) for tensor in optimiser.state()],
            "schedule": schedule.state(),
            "best": best.state(),
        }
        if time.monotonic() - self.written >= self.interval:
            self.write_latest()

    def write_latest(self) -> None:
        """Write the last epoch that was offered."""
        if self.latest is not None:
            results.save_tensors(self.latest, self.files.resume)
            self.latest, self.written = None, time.monotonic()

    @torch.no_grad()
    def restore(self, optimiser, schedule, best) -> list[dict]:
        """Put back what was found; returns the curves so far."""
        curves = self.found["curves"]
        for tensor, value in zip(optimiser.state(), self.found["optimiser"]):
            tensor.copy_(value)
        schedule.restore(self.found["schedule"])
        best.restore(self.found["best"], curves)
        return curves
