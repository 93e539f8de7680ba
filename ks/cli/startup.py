"""The first act of a script: signals, standard streams and the environment, before a library loads."""

import gc
import os
import sys

from ks import signals
from ks.cli.streams import make_forgiving


def begin(script: str) -> None:
    """Handle signals and failing standard streams from now on; called `if __name__ == "__main__"`.

    Imports leave no garbage: looking for it while they run would take a third of the time of starting. It is looked for
    again when the main function begins (`ks.cli.console.script`).

    MPLBACKEND counts for `--show` alone: matplotlib does not load with a wrong one, and files need none.

    Args:
        script: path of the script.
    """
    signals.install(script)
    make_forgiving()
    if "--show" not in sys.argv:
        os.environ.pop("MPLBACKEND", None)
    gc.disable()
