"""The launcher of a Ray cluster: each run is a process on a node; nodes share no files with the driver."""

import importlib.util
import os
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import ks
from ks.cli.flags import TRACKERS
from ks.errors import UsageError
from ks.files.atomic import atomic_path
from ks.study.processes import POLL_SECONDS, STOP_SECONDS, Exit, Launcher, LocalLauncher, Task

PACKAGE = Path(ks.__file__).resolve().parent

POST_SECONDS = 1.0
NODE_LOSSES = 3  # after which a task is not started again


@dataclass
class RayLauncher(Launcher):
    """Runs tasks on the nodes of a running Ray cluster; their files appear beside their logs here as they are written.

    The tasks of a lost node are started again elsewhere, from the files that were here when they were submitted.

    Args:
        address: HOST:PORT of the head node, or 'auto' for the cluster that this machine has joined.
        script: the program that tasks run; named without a path, since nodes have their own.
        inputs: the files that tasks read, by their path in the commands: name and content on a node.
        use_gpus: whether a task takes a GPU, if the cluster has any.
        jobs: largest number of tasks at a time, or None for as many as the cluster has resources for.
        timeout: seconds after which a task is stopped, or None.
    """

    address: str
    script: Path
    inputs: dict[str, tuple[str, bytes]]
    use_gpus: bool = True
    jobs: int | None = None
    timeout: float | None = None

    def __enter__(self) -> Self:
        """Connect to the cluster; its nodes get this package and the training script.

        Raises:
            UsageError: Ray is not installed, or the cluster cannot be joined.
        """
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError as error:
            raise UsageError("--launcher ray needs Ray: pip install -r requirements-ray.txt") from error
        on_terminate = signal.getsignal(signal.SIGTERM)
        modules = {"py_modules": [str(PACKAGE), str(self.script)]}
        try:
            if self.address != "auto":  # without this, Ray waits for minutes if nobody answers
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=self.address, runtime_env=modules, log_to_driver=False, logging_level="error")
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"--ray_address {self.address}: this machine cannot join a cluster there ({reason}); start one that "
                "includes this machine (docs/clusters.md)"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, on_terminate)  # Ray installs its own handler
        self._ray = ray
        self._stop: Callable[[], None] = lambda: None
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self._stop()
        finally:
            self._ray.shutdown()

    def run(self, tasks: Iterable[Task], poll: Callable[[list[Task]], None]) -> Iterator[tuple[Task, Exit]]:
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray = self._ray
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        on_gpus = self.use_gpus and ray.cluster_resources().get("GPU", 0) > 0
        resources = {"num_cpus": 1, "num_gpus": 1 if on_gpus else 0}
        remote = ray.remote(_run_on_node).options(max_retries=NODE_LOSSES, retry_exceptions=False, **resources)
        inputs = ray.put(self.inputs)
        waiting: deque[Task] = deque(tasks)
        submitted: dict = {}
        started: set[Task] = set()
        shared: dict[Task, set[str]] = {}  # the names of a task's files that are here

        def receive(task, files):
            shared[task] |= files.keys()
            _write_files(task.log.parent, files)

        def collect():
            for task, files in mailbox.get_nowait_batch(mailbox.qsize()):
                started.add(task)
                receive(task, files)

        def exit_of(task, reference):
            try:
                ended, files, names = ray.get(reference)
            except ray.exceptions.RayError as error:
                with open(task.log, "a", encoding="utf-8") as log:
                    log.write(f"Ray: {error}\n")
                return Exit(1, 0.0)
            receive(task, files)
            for name in shared[task] - set(names):  # the run has deleted it
                (task.log.parent / name).unlink(missing_ok=True)
            return ended

        self._stop = lambda: _cancel(submitted, collect, ray)
        while waiting or submitted:
            while waiting and (self.jobs is None or len(submitted) < self.jobs):
                task = waiting.popleft()
                task.log.parent.mkdir(parents=True, exist_ok=True)
                present = _Changes(task.log.parent).read()
                shared[task] = set(present)
                submitted[remote.remote(task, inputs, present, mailbox, self.timeout)] = task
            collect()
            poll([task for task in submitted.values() if task in started])
            ended, _ = ray.wait(list(submitted), timeout=POLL_SECONDS)
            collect()
            for reference in ended:
                task = submitted.pop(reference)
                yield task, exit_of(task, reference)


def _cancel(submitted: dict, collect: Callable[[], None], ray) -> None:
    """End tasks that still run: an interrupt first, so that their last files still arrive, then force."""
    for reference in submitted:
        ray.cancel(reference)
    left, deadline = list(submitted), time.monotonic() + 2 * STOP_SECONDS
    while left and time.monotonic() < deadline:
        _, left = ray.wait(left, num_returns=len(left), timeout=POLL_SECONDS)
        collect()
    for reference in left:
        ray.cancel(reference, force=True)


def _run_on_node(task: Task, inputs: dict, present: dict[str, bytes], mailbox, timeout: float | None):
    """Run a task in a temporary folder of a node; return its exit, the files not posted yet, the names of all."""
    with tempfile.TemporaryDirectory(prefix="ks_") as scratch:
        folder = Path(scratch) / "run"
        folder.mkdir()
        moved = {str(task.log.parent): str(folder)}
        for path, (name, content) in inputs.items():
            (Path(scratch) / name).write_bytes(content)
            moved[path] = str(Path(scratch) / name)
        _write_files(folder, present)
        _, script, *arguments = task.command
        found = importlib.util.find_spec(Path(script).stem)
        assert found is not None
        command = (sys.executable, str(found.origin), *(moved.get(argument, argument) for argument in arguments))
        changes = _Changes(folder)
        changes.read()
        mailbox.put((task, {}))

        def post(_):
            if time.monotonic() - changes.last_read >= POST_SECONDS and (files := changes.read()):
                mailbox.put((task, files))

        run = Task(task.name, command, folder / task.log.name)
        try:
            with LocalLauncher([{}], timeout) as local:
                [(_, ended)] = local.run([run], post)
        except BaseException:
            mailbox.put((task, changes.read()))
            raise
        return ended, changes.read(), list(_files_in(folder))


class _Changes:
    """The files of a folder that are new or changed since they were read last."""

    def __init__(self, folder: Path):
        self.folder, self.last_read = folder, time.monotonic()
        self.seen: dict[str, tuple[int, int]] = {}

    def read(self) -> dict[str, bytes]:
        """Return the name and content of each."""
        changed, self.last_read = {}, time.monotonic()
        for name in _files_in(self.folder):
            path = self.folder / name
            try:
                status = path.stat()
                if self.seen.get(name) != (status.st_mtime_ns, status.st_size):
                    changed[name] = path.read_bytes()
                    self.seen[name] = (status.st_mtime_ns, status.st_size)
            except FileNotFoundError:  # deleted in between
                continue
        return changed


def _files_in(folder: Path) -> list[str]:
    """Return the names of the results in a folder, and in those of trackers, without locks and files in writing."""
    paths = [*folder.iterdir(), *(path for tracker in TRACKERS for path in (folder / tracker).rglob("*"))]
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file() and not path.name.startswith(".")]


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
