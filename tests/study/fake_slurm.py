"""A stand-in for SLURM: `sbatch`, `squeue` and `scancel` on PATH, a table of jobs, and what a job does."""

import json
import os
import re
from pathlib import Path
from subprocess import CompletedProcess

from ks.study import slurm_cluster

PROGRAMS = {
    "sbatch": "cat > script; [ ! -f refusal ] || { cat refusal >&2; exit 1; }",
    "squeue": 'for option; do case $option in --name=*) cat "queue_${option#--name=}" || exit 1;; esac; done',
    "scancel": 'echo "$@" >> cancelled; case $1 in --name=*) for name in queue_*; do : > "$name"; done;; esac',
    "srun": "",
}


class FakeSlurm:
    """Jobs do what `self.job(number, part)` does when they are submitted, and end in the state it returns.

    A part has the name and the record of each run of a job. A state that is no end (PENDING, RUNNING) stays until the
    test changes `states`. The numbers count submissions; `job` refuses one by a RuntimeError.
    """

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.states, self.submitted, self.number = folder, {}, [], 0
        for name, code in PROGRAMS.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\ncd {folder}\n{code}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        call = slurm_cluster.call

        def call_or_submit(command, input="", seconds=30):
            return self.submit(input) if command[1:] == ["--parsable"] else call(command, input, seconds)

        monkeypatch.setattr(slurm_cluster, "call", call_or_submit)

    def submit(self, script: str) -> CompletedProcess:
        self.number += 1
        self.name = re.search(r"--job-name=(\S+)", script)[1]
        elements = json.loads(Path(script.split()[-1]).read_text())["elements"]
        parts = [[(json.loads(Path(path).read_text())["name"], path) for path in part] for part in elements]
        self.submitted.append((script, [[name for name, _ in part] for part in parts]))
        try:
            for index, part in enumerate(parts):
                self.set(f"{self.number}_{index}", self.job(self.number, part))
        except RuntimeError as refusal:
            return CompletedProcess([], 1, "", str(refusal))
        return CompletedProcess([], 0, f"{self.number};cluster\n", "")

    def set(self, job: str, state: str, reason: str = "None") -> None:
        self.states[job] = f"{job}|{state}" if "|" in state else f"{job}|{state}|{reason}"
        (self.folder / f"queue_{self.name}").write_text("\n".join(self.states.values()) + "\n")
