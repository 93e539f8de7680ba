"""The frame of a study, whose steps rank_sweep_study.py takes one after the other."""

import contextlib
from pathlib import Path
from typing import Self

from ks.cli.flags import SweepConfig
from ks.files.layout import SweepFiles
from ks.study.runs import Result, Run
from ks.study.task import Launcher


class Study:
    """What studies share; each kind has the steps load, plan, claim, run and conclude, in this order.

    load reads and checks what the flags name. plan computes floors and chooses what to train. claim takes the results
    folder. run trains whatever has not ended well before. conclude writes summary and figures.
    Leaving the study as a context stops whatever still runs, then lets other sweeps into the folder.

    Args:
        config: of the sweep.
        trainer: absolute path of the training script.
    """

    def __init__(self, config: SweepConfig, trainer: Path):
        self.config, self.trainer = config, trainer
        self.files = SweepFiles(Path(config.output_dir).absolute(), config.save_prefix, config.metric)
        self.results: dict[Run, Result] = {}
        self.places = contextlib.ExitStack()  # the launcher, until all has run
        self.locks = contextlib.ExitStack()  # of the folders, until all is written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self.locks:
            self.places.close()

    def check_folder(self) -> None:
        """Raise UsageError if the results folder is in use or holds another study, before floors are computed."""

    def make_launcher(self) -> Launcher:
        """Return the launcher that the flags name, with the files that runs elsewhere read."""
        raise NotImplementedError

    def open_launcher(self) -> None:
        """Open the launcher, before anything of the folder is claimed.

        Raises:
            UsageError: places that do not exist, or a cluster that cannot be joined.
        """
        self.launcher = self.places.enter_context(self.make_launcher())
