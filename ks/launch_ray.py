"""Run the trainings on a Ray cluster, each a process on one of its nodes. Nodes share no files with the driver."""

import importlib.util
import os
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ks import results
from ks.launch import POLL_SECONDS, STOP_SECONDS, Outcome, Task, run_local

POST_SECONDS = 1.0
NODE_LOSSES = 3  # a training is started again after so many at most


@contextmanager
def connected(address: str, script: Path):
    """Connect to a running cluster; its nodes get this package and the training script.

    Args:
        address: HOST:PORT of the head node, or 'auto' for the cluster that this machine has joined.
        script: the program that tasks run; without a path, since nodes have their own.
    Yields:
        the ray module.
    Raises:
        ValueError: Ray is not installed, or there is no such cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ValueError("--launcher ray needs Ray: pip install -r requirements-ray.txt") from error
    on_terminate = signal.getsignal(signal.SIGTERM)
    modules = {"py_modules": [str(Path(__file__).resolve().parent), str(script)]}
    try:
        if address != "auto":  # without this, Ray waits for minutes where nobody answers
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, runtime_env=modules, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--ray_address {address}: no cluster to be joined from here ({reason}); start one as README says, with "
            "this machine a node of it"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own
    try:
        yield ray
    finally:
        ray.shutdown()


def run_ray(
    tasks: Iterable[Task],
    ray,
    inputs: dict[str, tuple[str, bytes]],
    resources: dict[str, float],
    jobs: int | None,
    poll: Callable[[list[Task]], None],
    timeout: float | None = None,
) -> Iterator[tuple[Task, Outcome]]:
    """Run tasks on the nodes of a cluster; their files appear beside their logs here as they are written there.

    A lost node's tasks are started again elsewhere, from the files that were here when they were submitted.

    Args:
        tasks: what to run, in this order.
        ray: connected.
        inputs: the files that tasks read, by their path in the commands: name and content on a node.
        resources: of each task: num_cpus, num_gpus.
        jobs: at most so many at a time, or None for as many as the cluster has resources for.
        poll, timeout: as in `ks.launch.run_local`.
    Yields:
        (task, outcome) as each ends; a failure is an outcome, never an exception.
    """
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    remote = ray.remote(_run_on_node).options(max_retries=NODE_LOSSES, retry_exceptions=False, **resources)
    inputs = ray.put(inputs)
    waiting, submitted, started, shared = deque(tasks), {}, set(), {}

    def receive(task, files):
        shared[task] |= files.keys()
        _write_files(task.log.parent, files)

    def collect():
        for task, files in mailbox.get_nowait_batch(mailbox.qsize()):
            started.add(task)
            receive(task, files)

    def outcome_of(task, reference):
        try:
            outcome, files, names = ray.get(reference)
        except ray.exceptions.RayError as error:
            with open(task.log, "a") as log:
                log.write(f"Ray: {error}\n")
            return Outcome(1, 0.0)
        receive(task, files)
        for name in shared[task] - set(names):  # the run has deleted it
            (task.log.parent / name).unlink(missing_ok=True)
        return outcome

    try:
        while waiting or submitted:
            while waiting and (jobs is None or len(submitted) < jobs):
                task = waiting.popleft()
                present = _Changes(task.log.parent).read()
                shared[task] = set(present)
                submitted[remote.remote(task, inputs, present, mailbox, timeout)] = task
            collect()
            poll([task for task in submitted.values() if task in started])
            ended, _ = ray.wait(list(submitted), timeout=POLL_SECONDS)
            collect()
            for reference in ended:
                task = submitted.pop(reference)
                yield task, outcome_of(task, reference)
    finally:
        _cancel(submitted, collect, ray)


def _cancel(submitted: dict, collect: Callable[[], None], ray) -> None:
    """End what still runs, as `ks.launch.stop` does: an interrupt, so that last files still arrive, then by force."""
    for reference in submitted:
        ray.cancel(reference)
    left, deadline = list(submitted), time.monotonic() + 2 * STOP_SECONDS
    while left and time.monotonic() < deadline:
        _, left = ray.wait(left, num_returns=len(left), timeout=POLL_SECONDS)
        collect()
    for reference in left:
        ray.cancel(reference, force=True)


def _run_on_node(task: Task, inputs: dict, present: dict[str, bytes], mailbox, timeout: float | None):
    """One task in a temporary folder of a node: its outcome, the files not posted yet, the names of all."""
    with tempfile.TemporaryDirectory(prefix="ks_") as scratch:
        scratch = Path(scratch)
        folder = scratch / "run"
        folder.mkdir()
        moved = {str(task.log.parent): str(folder)}
        for path, (name, content) in inputs.items():
            (scratch / name).write_bytes(content)
            moved[path] = str(scratch / name)
        _write_files(folder, present)
        _, script, *arguments = task.command
        script = importlib.util.find_spec(Path(script).stem).origin
        command = (sys.executable, script, *(moved.get(argument, argument) for argument in arguments))
        changes = _Changes(folder)
        changes.read()
        mailbox.put((task, {}))

        def post(_):
            if time.monotonic() - changes.last_read >= POST_SECONDS and (files := changes.read()):
                mailbox.put((task, files))

        run = Task(task.name, command, folder / task.log.name)
        try:
            [(_, outcome)] = run_local([run], [{}], post, timeout)
        except BaseException:
            mailbox.put((task, changes.read()))
            raise
        return outcome, changes.read(), [path.name for path in _files_in(folder)]


class _Changes:
    """The files of a folder that are new or changed since they were read last."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.last_read = folder, {}, time.monotonic()

    def read(self) -> dict[str, bytes]:
        """Name and content of each."""
        changed, self.last_read = {}, time.monotonic()
        for path in _files_in(self.folder):
            try:
                status = path.stat()
                if self.seen.get(path.name) != (status.st_mtime_ns, status.st_size):
                    changed[path.name] = path.read_bytes()
                    self.seen[path.name] = (status.st_mtime_ns, status.st_size)
            except FileNotFoundError:  # deleted in between
                continue
        return changed


def _files_in(folder: Path) -> list[Path]:
    """Results, not locks or files that are being written."""
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with results.atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
