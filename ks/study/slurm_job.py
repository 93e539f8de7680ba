"""What a job of SLURM does on a node: it runs its tasks one after the other, and records how each one stands.

    python -m ks.study.slurm_job JOBS.json

The driver (`ks.study.slurm_cluster`) has written the file: the records of each element of the job array.
"""

import contextlib
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

from ks import signals
from ks.cli.console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from ks.files.atomic import read_json_object, write_json
from ks.study.processes import Exit, LocalLauncher, Task

LOSSES = 2  # after which a run does not begin again
TOO_OFTEN = f"SLURM job {{}} was lost, as {LOSSES} before it"


def main(jobs: str) -> None:
    """Run the tasks of this element.

    A requeued job goes on where it was. A signal of SLURM ends the current run, which writes its resume state, and no
    other one begins.
    """
    signals.install(__file__)
    signals.begin()
    with contextlib.suppress(KeyboardInterrupt), signals.deferred():
        content = json.loads(Path(jobs).read_text("utf-8"))
        for record in content["elements"][int(os.environ["SLURM_ARRAY_TASK_ID"])]:
            if not signals.came():
                _run_recorded(Path(record), content["timeout"])


def _run_recorded(path: Path, timeout: float | None) -> None:
    record = read_json_object(path)
    ended = record["exit"] and Exit(**record["exit"])
    if ended and ended.code != EXIT_INTERRUPTED:
        return
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if record["started"] and not ended:
        record["lost"] += 1
    record |= {"started": f"{platform.node()}, job {job}", "exit": None}
    write_json(path, record)
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "1")
    if record["lost"] > LOSSES:
        ended = Exit(EXIT_FAILED, 0.0, error=TOO_OFTEN.format(job))
    else:
        task = Task(record["name"], tuple(record["command"]), Path(record["log"]))
        try:
            with LocalLauncher([{"OMP_NUM_THREADS": cores}], timeout) as local:
                [(_, ended)] = local.run([task], lambda running: signals.check())
        except KeyboardInterrupt:
            ended = Exit(EXIT_INTERRUPTED, 0.0)
        if signals.came() and ended.code != EXIT_OK:
            ended = dataclasses.replace(ended, code=EXIT_INTERRUPTED)
    write_json(path, record | {"exit": dataclasses.asdict(ended)})


if __name__ == "__main__":
    main(sys.argv[1])
