"""The steps of a study, in the order in which rank_sweep_study.py takes them."""

import abc
import contextlib
from pathlib import Path
from typing import Self

from ks.cli.flags import SweepConfig
from ks.files.layout import SweepFiles
from ks.files.status import Status
from ks.study.runs import Result, Run
from ks.study.task import Launcher


class Study(abc.ABC):
    """A study: load, plan, open the launcher, claim, run, conclude. Leaving it as a context stops whatever still runs.

    Args:
        config: of the sweep.
        trainer: absolute path of the training script.
    """

    def __init__(self, config: SweepConfig, trainer: Path):
        self.config, self.trainer = config, trainer
        self.files = SweepFiles(Path(config.output_dir).absolute(), config.save_prefix, config.metric)
        self.results: dict[Run, Result] = {}
        self.launcher: Launcher
        self.places = contextlib.ExitStack()  # the launcher, until all has run
        self.locks = contextlib.ExitStack()  # of the folders, until all is written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self.locks:
            self.places.close()

    @abc.abstractmethod
    def load(self) -> None:
        """Read and check what the flags name; write nothing."""

    @abc.abstractmethod
    def plan(self) -> None:
        """Compute the floors, and choose what to train."""

    @abc.abstractmethod
    def plan_text(self) -> str:
        """Return the plan, for --dry_run."""

    @abc.abstractmethod
    def make_launcher(self) -> Launcher:
        """Return the launcher that the flags name, with the files that runs elsewhere read."""

    def open_launcher(self) -> None:
        """Open the launcher before anything of the folder is claimed.

        Raises:
            UsageError: places that do not exist, or a cluster that cannot be joined.
        """
        self.launcher = self.places.enter_context(self.make_launcher())

    @abc.abstractmethod
    def claim(self) -> None:
        """Claim the results folder.

        Raises:
            UsageError: it is in use, or it holds another study.
        """

    @abc.abstractmethod
    def run(self) -> None:
        """Train what has not ended well before, also when some runs fail."""

    @abc.abstractmethod
    def conclude(self) -> list[str]:
        """Write summary and figures; return the lines to print."""

    @abc.abstractmethod
    def check_floors(self) -> None:
        """Raise InternalError if a finished run is below its floor."""

    @abc.abstractmethod
    def statuses(self) -> set[Status]:
        """Return how the runs ended, once the study is concluded."""
