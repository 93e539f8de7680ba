"""A stand-in for SLURM and submitit: `sbatch`, `squeue` and `scancel` on PATH, a table of jobs, and what a job does."""

import os
import sys
import types
from pathlib import Path

PROGRAMS = {
    "sbatch": "cat > script; [ ! -f refusal ] || { cat refusal >&2; exit 1; }",
    "squeue": 'for option; do case $option in --name=*) cat "queue_${option#--name=}" || exit 1;; esac; done',
    "scancel": 'echo "$@" >> cancelled; case $1 in --name=*) for name in queue_*; do : > "$name"; done;; esac',
    "srun": "",
}


class FakeSlurm:
    """Jobs do what `self.job(number, tasks_and_records)` does when they are submitted, and end in the state it returns.

    A state that is no end (PENDING, RUNNING) stays until the test changes `states`. The numbers count submissions.
    """

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.states, self.submitted, self.number = folder, {}, [], 0
        for name, code in PROGRAMS.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\ncd {folder}\n{code}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        slurm = self

        class SlurmExecutor:
            _submitit_command_str = "python -m submitit"

            def __init__(self, folder):
                self.parameters = {}

            def update_parameters(self, **parameters):
                self.parameters |= parameters

            def _make_submission_file_text(self, command, uid):
                return "\n".join([*(f"{key}={value}" for key, value in self.parameters.items()), command])

            def map_array(self, function, parts, timeouts):
                assert function.__module__ == "ks.study.slurm_cluster"
                return slurm.submit(self.parameters, parts)

        module = types.SimpleNamespace(SlurmExecutor=SlurmExecutor)
        parents = {name: types.ModuleType(name) for name in ("submitit", "submitit.slurm")}
        parents["submitit"].slurm, parents["submitit.slurm"].slurm = parents["submitit.slurm"], module
        for name, value in (parents | {"submitit.slurm.slurm": module}).items():
            monkeypatch.setitem(sys.modules, name, value)

    def submit(self, parameters, parts):
        self.number += 1
        self.name = parameters["job_name"]
        self.submitted.append((parameters, [[task.name for task, _ in part] for part in parts]))
        jobs = []
        for index, part in enumerate(parts):
            job = f"{self.number}_{index}"
            self.set(job, self.job(self.number, part))
            jobs.append(types.SimpleNamespace(job_id=job))
        return jobs

    def set(self, job: str, state: str, reason: str = "None") -> None:
        self.states[job] = f"{job}|{state}" if "|" in state else f"{job}|{state}|{reason}"
        (self.folder / f"queue_{self.name}").write_text("\n".join(self.states.values()) + "\n")
