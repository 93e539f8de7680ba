"""The launcher of a SLURM cluster: each run is a process in an element of a job array; nodes share the file system.

A job writes how each of its runs stands into a record in the results folder. The driver reads the records, and asks the
queue only about jobs that leave a run without an end.
"""

import contextlib
import dataclasses
import os
import platform
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import ks
from ks import signals
from ks.cli.console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, note
from ks.errors import UsageError, one_line
from ks.files.atomic import read_json_object, write_json
from ks.study.processes import POLL_SECONDS, Exit, Launcher, LocalLauncher, Task
from ks.study.slurm_queue import ENDED_FOR_GOOD, Queue, call, in_queue, in_words, wait_for_end

if TYPE_CHECKING:  # a job does without torch, which this module loads
    from ks.cli.flags import SweepConfig

FOLDER = ".ks_slurm"  # in the results folder: the name of the jobs, a record for each run, the files of submitit
PROGRAMS = ("sbatch", "squeue", "scancel", "srun")
SIGNAL = "USR1@90"  # comes so many seconds before the time limit
LOSSES = 2  # after which a run is not submitted again
TOO_OFTEN = f"SLURM job {{}} was lost, as {LOSSES} before it"
POLLS = 10  # between two looks at the records
CANCEL_SECONDS = 40.0  # 30 seconds after it has asked processes to end, SLURM kills them
# Settings of sbatch and of submitit that the launcher chooses.
OWN = {
    *("array", "array_parallelism", "job_name", "output", "error", "open_mode", "stderr_to_stdout", "signal_delay_s"),
    *("nodes", "ntasks", "ntasks_per_node", "setup", "teardown", "srun_args", "use_srun", "additional_parameters"),
    *("wrap", "parsable", "wait", "test_only", "chdir"),
}


@dataclass
class _Run:
    """A task that is not done yet. written: bytes of its curves when it was submitted."""

    task: Task
    record: Path
    lost: int = 0
    begun: bool = False
    written: int = 0

    def reset(self, lost: int) -> None:
        """Prepare the record for a submission."""
        self.written = self._bytes()
        write_json(self.record, {"lost": lost, "started": None, "exit": None})

    def read(self) -> Exit | None:
        """Read the record; return the exit of the run, if it has one."""
        record = read_json_object(self.record)
        self.lost = record.get("lost", self.lost)
        ended = record.get("exit")
        self.begun = bool(record.get("started")) and ended is None
        return Exit(**ended) if ended else None

    def got_on(self) -> bool:
        """Return whether epochs were added since the submission."""
        return self._bytes() > self.written

    def _bytes(self) -> int:
        return sum(path.stat().st_size for path in self.task.log.parent.glob("*_loss_curves.csv"))


class SlurmLauncher(Launcher):
    """Submits tasks as a job array, and those that are lost once more.

    Args:
        config: of the sweep; the nodes share the file system of its results.
        runs: the number of tasks, at most.
    Raises:
        UsageError: SLURM or submitit is not here, or a setting that the launcher chooses itself.
    """

    def __init__(self, config: "SweepConfig", runs: int):
        if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
            raise UsageError(
                f"--launcher slurm: {missing[0]} is not on PATH; start the sweep on a login node, or choose another "
                "--launcher"
            )
        try:
            import submitit.slurm.slurm as submitit
        except ImportError as error:
            raise UsageError("--launcher slurm needs submitit: pip install -r requirements-slurm.txt") from error
        self._submitit = submitit
        split = [setting.partition("=") for setting in config.slurm]
        self.settings = {key.replace("-", "_"): value if equals else True for key, equals, value in split}
        if chosen := OWN & self.settings.keys():
            raise UsageError(f"--slurm {min(chosen)}: the launcher chooses it; leave it out (docs/clusters.md)")
        self.folder, self.name = Path(config.output_dir).absolute() / FOLDER, f"ks_{uuid.uuid4().hex[:8]}"
        self.config, self.runs, self._done = config, runs, True

    def __enter__(self) -> Self:
        """Let sbatch check the settings.

        Raises:
            UsageError: it refuses them, or does not answer.
        """
        if not self.check():
            raise UsageError(
                "--launcher slurm: sbatch does not answer; does sinfo list the partitions on this machine?"
            )
        return self

    def check(self) -> bool:
        """Let sbatch check the settings; return whether it answers.

        Raises:
            UsageError: it refuses them.
        """
        if "SLURM_JOB_ID" in os.environ:  # the driver is a job itself, and its jobs would inherit its resources
            for name in [name for name in os.environ if name.startswith(("SLURM_", "SRUN_")) and name != "SLURM_CONF"]:
                del os.environ[name]
        os.environ["SBATCH_JOB_NAME"] = self.name  # it wins over the script
        script = self.script()
        done = call(["sbatch", "--test-only"], script)
        if done and done.returncode:
            try:  # --test-only also refuses what no node can run right now
                done = call(["sbatch", "--begin=now+1hour"], script)
            finally:
                call(["scancel", f"--name={self.name}"])
        if done and done.returncode:
            given = " ".join(key if value is True else f"{key}={value}" for key, value in self.settings.items())
            raise UsageError(f"sbatch refuses --slurm {given or 'without a setting'}: {_reason(done.stderr)}")
        return done is not None

    def script(self) -> str:
        """Return the script that sbatch gets for all runs."""
        elements = -(-self.runs // self.config.runs_per_job)
        executor = self._executor(elements)
        executor.parameters |= {"map_count": elements} if elements > 1 else {}
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def _executor(self, elements: int):
        executor = self._submitit.SlurmExecutor(self.folder)
        path = [str(Path(ks.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        executor.update_parameters(
            job_name=self.name,
            time=None,  # submitit has defaults for this one and the next
            wckey=None,
            array_parallelism=elements if self.config.jobs == "auto" else self.config.jobs,
            setup=[
                f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(os.pathsep.join(path))}",
                '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',  # srun forgets it
            ],
            additional_parameters={"signal": SIGNAL, "requeue": True} | self.settings,
        )
        return executor

    def __exit__(self, kind, error, traceback) -> None:
        if not self._done:
            ids = in_queue(self.name)
            call(["scancel", f"--name={self.name}"])
            if ids != []:
                note(f"cancelled {in_words(ids)}" if ids else f"scancel --name={self.name} was not answered")
        if self.folder.exists() and wait_for_end(self.name, CANCEL_SECONDS):
            shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, tasks: Iterable[Task], poll: Callable[[list[Task]], None]) -> Iterator[tuple[Task, Exit]]:
        waiting = [_Run(task, self.folder / f"run_{number}.json") for number, task in enumerate(tasks)]
        if not waiting:
            return
        self._done = False
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "sweep.json", {"job_name": self.name})  # for a sweep after one that is killed
        for run in waiting:
            run.reset(0)
        jobs: dict[str, list[_Run]] = {}
        queue = Queue(self.name, self.config.quiet)
        while waiting or jobs:
            if waiting:
                try:
                    jobs |= self._submit(waiting)
                except (RuntimeError, OSError) as error:
                    poll([])  # after Ctrl-C, which ends sbatch too
                    refused = Exit(EXIT_FAILED, 0.0, error=f"sbatch: {_reason(str(error))}")
                    yield from ((run.task, refused) for run in waiting)
                waiting = []
            queue.ask(jobs)
            for job, runs in list(jobs.items()):
                for run, ended in list(self._ended(job, runs, queue)):
                    runs.remove(run)
                    if ended is None:
                        waiting.append(run)
                    else:
                        yield run.task, ended
                if not runs:
                    del jobs[job]
            running = [run.task for runs in jobs.values() for run in runs if run.begun]
            queue.report_reasons(bool(running))
            for _ in range(POLLS):
                poll(running)
                time.sleep(POLL_SECONDS)
        self._done = True

    def _submit(self, runs: list[_Run]) -> dict[str, list[_Run]]:
        """Submit runs as one array; return the runs of each job by its id."""
        count = self.config.runs_per_job
        parts = [runs[start : start + count] for start in range(0, len(runs), count)]
        executor = self._executor(len(parts))
        arguments = [[(run.task, run.record) for run in part] for part in parts]
        timeouts = [self.config.timeout_per_rank] * len(parts)
        submitted = [job.job_id for job in executor.map_array(run_in_job, arguments, timeouts)]
        shared = f" in {len(parts)} array elements" if len(parts) > 1 else ""
        note(f"{in_words(submitted[:1])}: {len(runs)} run{'s' * (len(runs) > 1)}{shared}", self.config.quiet)
        return dict(zip(submitted, parts))

    def _ended(self, job: str, runs: list[_Run], queue: Queue) -> Iterator[tuple[_Run, Exit | None]]:
        """Yield the runs of a job that have ended, with their exits; None for those to be submitted again."""
        state, left, cut_off = queue.state(job), queue.has_left(job), []
        if state == "PENDING":
            return
        for run in runs:
            ended = run.read()
            if ended is None or ended.code == EXIT_INTERRUPTED:
                cut_off.append(run)
            elif ended.code >= 0:
                yield run, ended
            elif left:  # SLURM reports at the end of the job who killed the run
                yield run, self._explained(run, job, state, ended)
        if left and cut_off:
            call(["scancel", job])  # it may be held, or on a node that has lost its network
            for run in cut_off:
                yield run, self._lost(run, job, state, first=run is cut_off[0])

    def _lost(self, run: _Run, job: str, state: str, first: bool) -> Exit | None:
        """Return the exit of a run that its job has left without an end; None if it is to be submitted again.

        Args:
            first: it has not begun or was cut off; the other runs of the job were not reached.
        """
        if state in ENDED_FOR_GOOD:
            return self._explained(run, job, state, Exit(EXIT_FAILED, 0.0))
        lost = run.lost
        if first and not (run.read() and run.got_on()):
            lost += 1
            note(f"{run.task.name}: SLURM job {job} was lost ({state}), {lost} of {LOSSES + 1}", self.config.quiet)
        elif first:
            note(f"{run.task.name}: SLURM job {job} was interrupted ({state})", self.config.quiet)
        if lost > LOSSES:
            return self._explained(run, job, state, Exit(EXIT_FAILED, 0.0, error=TOO_OFTEN.format(job)))
        run.reset(lost)
        return None

    def _explained(self, run: _Run, job: str, state: str, ended: Exit) -> Exit:
        """Return the exit of a run that was killed or never began, in the words of SLURM; its log gets the details."""
        try:
            lines = (self.folder / f"{job}_0_log.err").read_text("utf-8", errors="replace").splitlines()[-12:]
        except OSError:
            lines = [f"it left no output; is {self.folder.parent} on a file system that the nodes share?"]
        run.task.log.parent.mkdir(parents=True, exist_ok=True)
        with open(run.task.log, "a", encoding="utf-8") as log:
            log.write("\n".join([f"SLURM job {job}: {state}", *lines, ""]))
        if state in ENDED_FOR_GOOD:
            return dataclasses.replace(ended, error=f"SLURM job {job}: {state}")
        return ended if ended.code >= 0 else dataclasses.replace(ended, error=f"killed by signal {-ended.code}")


def _reason(refusal: str) -> str:
    """Return the first line that sbatch prints when it refuses a script; the next ones repeat it."""
    return one_line(refusal.strip().partition("\n")[0].removeprefix("sbatch: error: "), 300)


def cancel_left(results: Path) -> None:
    """Cancel the jobs that a killed sweep left in a results folder, and wait until they have ended.

    Raises:
        UsageError: they cannot be cancelled from here.
    """
    folder = results / FOLDER
    name = read_json_object(folder / "sweep.json").get("job_name")
    if name is None:
        return
    if ids := in_queue(name):
        call(["scancel", f"--name={name}"])
        note(f"cancelled {in_words(ids)} of an earlier sweep")
    if not wait_for_end(name, CANCEL_SECONDS):
        raise UsageError(
            f"{results} is in use by SLURM jobs of an earlier sweep; on the cluster, scancel --name={name} ends them. "
            f"Then delete {folder}"
        )
    shutil.rmtree(folder)


def run_in_job(tasks: list[tuple[Task, Path]], timeout: float | None) -> None:
    """Run tasks one after the other, on a node; each comes with its record.

    A requeued job goes on where it was. A signal of SLURM ends the current run, which writes its resume state, and no
    other one begins.
    """
    signals.install(__file__)
    signals.begin()
    with contextlib.suppress(KeyboardInterrupt), signals.deferred():
        for task, path in tasks:
            if not signals.came():
                _run_recorded(task, path, timeout)


def _run_recorded(task: Task, path: Path, timeout: float | None) -> None:
    record = read_json_object(path)
    ended = record["exit"] and Exit(**record["exit"])
    if ended and ended.code != EXIT_INTERRUPTED:
        return
    array = [os.environ[name] for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if name in os.environ]
    job = "_".join(array) or os.environ["SLURM_JOB_ID"]
    if record["started"] and not ended:
        record["lost"] += 1
    record |= {"started": f"{platform.node()}, job {job}", "exit": None}
    write_json(path, record)
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "1")
    if record["lost"] > LOSSES:
        ended = Exit(EXIT_FAILED, 0.0, error=TOO_OFTEN.format(job))
    else:
        try:
            with LocalLauncher([{"OMP_NUM_THREADS": cores}], timeout) as local:
                [(_, ended)] = local.run([task], lambda running: signals.check())
        except KeyboardInterrupt:
            ended = Exit(EXIT_INTERRUPTED, 0.0)
        if signals.came() and ended.code != EXIT_OK:
            ended = dataclasses.replace(ended, code=EXIT_INTERRUPTED)
    write_json(path, record | {"exit": dataclasses.asdict(ended)})
