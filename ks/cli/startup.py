"""The first act of a script: signals, standard streams and the environment, before a library loads."""

import gc
import os
import sys

from ks import signals
from ks.cli.streams import make_forgiving


def begin(script: str, task: str = "") -> None:
    """Handle signals and failing standard streams from now on; called `if __name__ == "__main__"`.

    Imports leave no garbage: looking for it while they run would take a third of the time of starting. It is looked for
    again when the main function begins (`ks.cli.console.script`).

    Threads that wait for the next product sleep instead of spinning: on cores shared with another process, spinning
    made an epoch 6 times longer and the floors of the demo 20 times. OpenMP reads that when torch loads.

    MPLBACKEND counts for `--show` alone: matplotlib does not load with a wrong one, and files need none.

    Args:
        script: path of the script.
        task: what the script does, for a person who waits at a terminal while libraries load.
    """
    signals.install(script)
    make_forgiving()
    if task and sys.stderr.isatty() and not {"--quiet", "--help", "--help_all", "-h"} & {*sys.argv}:
        print(f"{os.path.basename(script)}: {task}", file=sys.stderr, flush=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "--show" not in sys.argv:
        os.environ.pop("MPLBACKEND", None)
    gc.disable()
