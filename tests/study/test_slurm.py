"""The SLURM launcher on a real cluster of two nodes; `make test-slurm` gives it namespaces of its own.

The training script is edited so that each epoch waits while a file `slow` exists: no run ends before it is disturbed.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import copy_toolkit, edited_text, files_of, read_table, wait_for
from test_survival import assert_same_run
from two_nodes import TwoNodes, environment_of, parent_of, processes

from ks.files.curves import curves_if_any

ALONE = [name for _, name in socket.if_nameindex()] == ["lo"]
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(not ALONE, reason="not in a network namespace of its own")]
RANKS = (1, 2, 4)
SETTINGS = ("--num_samples", "80", "--batch_size", "16", "--num_epochs", "200", "--latency_seconds", "0")
SLOW = """\
    import os, time
    if os.path.exists({path!r}):
        time.sleep(0.3)
    return {{}}
"""


@dataclass
class Sweep:
    """A sweep by a copy of the toolkit in `toolkit`, with its results in `results`."""

    toolkit: Path
    results: Path

    def start(self, *arguments, ranks=RANKS) -> subprocess.Popen:
        command = [sys.executable, str(self.toolkit / "rank_sweep_study.py"), "--weight_path", "weight.pth", *SETTINGS]
        with open(f"{self.results}.err", "w") as errors:
            return subprocess.Popen(
                [*command, "--ranks", *map(str, ranks), "--output_dir", str(self.results), *arguments],
                cwd=self.toolkit,
                text=True,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def on_slurm(self, *arguments, ranks=RANKS) -> subprocess.Popen:
        return self.start("--launcher", "slurm", *arguments, ranks=ranks)

    def stderr(self) -> str:
        return Path(f"{self.results}.err").read_text()

    def slow_down(self) -> None:
        (self.toolkit / "slow").touch()

    def hurry(self) -> None:
        (self.toolkit / "slow").unlink(missing_ok=True)

    def files(self, rank: int):
        return files_of(self.results, rank)

    def epochs(self, rank: int) -> int:
        return len(curves_if_any(self.files(rank).curves_csv) or ())

    def process(self, rank: int) -> int | None:
        """The process of a run, if it has one; there is never a second one."""
        found = processes("train_with_random.py", f"{self.results}/rank_{rank} ")
        assert len(found) <= 1
        return found[0] if found else None

    def job(self, rank: int) -> str:
        return environment_of(self.process(rank))["SLURM_JOB_ID"]

    def node(self, rank: int) -> str:
        return environment_of(self.process(rank))["SLURMD_NODENAME"]

    def wait_for_epochs(self, ranks=RANKS) -> None:
        """Wait until these runs train, each beyond the epochs that it has."""
        before = {rank: self.epochs(rank) for rank in ranks}
        wait_for(lambda: all(self.process(rank) and self.epochs(rank) > before[rank] for rank in ranks))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    pytest.importorskip("submitit")
    return TwoNodes(tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def slurm(cluster):
    """The cluster with an empty queue and two idle nodes."""
    cluster.reset()
    return cluster


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """The sweep on this machine."""
    toolkit = tmp_path_factory.mktemp("toolkit")
    copy_toolkit(toolkit)
    (toolkit / "train_with_random.py").write_text(edited_text(metrics=SLOW.format(path=str(toolkit / "slow"))))
    torch.save(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), toolkit / "weight.pth")
    sweep = Sweep(toolkit, toolkit / "local")
    assert sweep.start().wait(300) == 0, sweep.stderr()
    return sweep


@pytest.fixture
def sweep(slurm, local, tmp_path):
    """The same sweep elsewhere, slow."""
    sweep = Sweep(local.toolkit, tmp_path / "out")
    sweep.slow_down()
    return sweep


@pytest.fixture
def assert_as_local(slurm, local, sweep):
    """Check a sweep that has ended: its files are those of the local one, nothing is left, and these runs resumed."""

    def check(process, resumed=()):
        assert process.wait(120) == 0, sweep.stderr() + slurm.logs()
        for rank in RANKS:
            assert_same_run(sweep.files(rank), local.files(rank))
        assert not (sweep.results / ".ks_slurm").exists()
        assert slurm.queue() == []
        for rank in resumed:
            assert json.loads(sweep.files(rank).training_log.read_text())["resumed_after"] > 0

    return check


def test_a_sweep_is_the_same_as_on_one_machine(sweep, assert_as_local):
    sweep.hurry()
    assert_as_local(sweep.on_slurm("--runs_per_job", "2"))
    assert "3 runs in 2 array elements" in sweep.stderr()


def test_a_dry_run_prints_a_script_that_sbatch_accepts(slurm, sweep):
    process = sweep.on_slurm("--dry_run", "--slurm", "partition=urgent", "time=5", "gpus_per_node=1")
    script = "#!" + process.communicate(timeout=120)[0].partition("#!")[2]
    assert process.returncode == 0, sweep.stderr()
    assert {"#SBATCH --partition=urgent", "#SBATCH --time=5", "#SBATCH --gpus-per-node=1"} <= {*script.splitlines()}
    assert "#SBATCH --array=0-2" in script
    subprocess.run(["sbatch", "--test-only"], input=script, check=True, text=True)
    assert slurm.queue() == []
    assert not sweep.results.exists()


def test_an_unknown_partition_is_one_line(slurm, sweep):
    assert sweep.on_slurm("--slurm", "partition=nowhere").wait(120) == 2
    assert len(sweep.stderr().splitlines()) == 1
    assert "sbatch refuses --slurm partition=nowhere: " in sweep.stderr()
    assert not sweep.results.exists()
    assert slurm.queue() == []


def test_the_runs_of_a_lost_node_finish_on_the_other(slurm, sweep, assert_as_local):
    process = sweep.on_slurm()
    sweep.wait_for_epochs()
    node = sweep.node(4)
    slurm.kill(node)
    wait_for(lambda: slurm.states()[node] == "down*")
    sweep.hurry()
    assert_as_local(process)
    assert slurm.states()[node] == "down*"


def test_a_run_whose_nodes_are_lost_again_and_again_fails(slurm, sweep):
    process = sweep.on_slurm(ranks=(1,))
    for _ in range(3):
        sweep.wait_for_epochs((1,))
        node = sweep.node(1)
        slurm.kill(node)
        slurm.call(
            "scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test"
        )  # the controller knows at once
        slurm.restore(node)
    assert process.wait(120) == 1, sweep.stderr()
    assert "was lost" in read_table(sweep.results / "rank_sweep_summary.csv")[0]["status"]
    assert slurm.queue() == []


def test_preempted_and_requeued_runs_resume(slurm, sweep, assert_as_local):
    process = sweep.on_slurm()
    sweep.wait_for_epochs()
    node = sweep.node(4)
    urgent = slurm.submit("sleep 1000", "-p", "urgent", "-w", node, "--exclusive")
    slurm.call("scontrol", "requeue", sweep.job(1))
    wait_for(lambda: f"{urgent} RUNNING" in slurm.queue("%i %T"))
    slurm.call("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")  # so that they go on elsewhere
    slurm.call("scancel", urgent)
    sweep.hurry()
    assert_as_local(process, resumed=(1, 4))


def test_killed_processes_are_noticed(slurm, sweep):
    process = sweep.on_slurm()
    sweep.wait_for_epochs()
    for victim in (sweep.process(1), parent_of(sweep.process(2))):
        os.kill(victim, signal.SIGKILL)
    wait_for(lambda: not sweep.process(2))
    sweep.hurry()
    assert process.wait(120) == 3, sweep.stderr()
    status = {int(row["rank"]): row["status"] for row in read_table(sweep.results / "rank_sweep_summary.csv")}
    assert status[4] == "ok"
    assert "FAILED" in status[2]
    assert status[1] == "failed (killed by signal 9)"
    assert re.search(r"rank 2: failed .* end of .*\n(  .*\n)+  srun: error: n.: task 0: Killed", sweep.stderr())
    assert slurm.queue() == []


def test_a_full_queue_and_an_interrupt(slurm, sweep, assert_as_local):
    slurm.fill(3)
    last = slurm.fill(1)
    wait_for(lambda: slurm.queue("%T") == ["RUNNING", "RUNNING"])
    process = sweep.on_slurm()
    wait_for(lambda: "waiting for SLURM (" in sweep.stderr())
    slurm.call("scancel", last)
    sweep.wait_for_epochs((4,))
    assert slurm.queue("%T").count("PENDING") == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, sweep.stderr()
    assert "cancelled SLURM job" in sweep.stderr()
    assert slurm.queue("%j") == ["wrap"]
    assert sweep.files(4).resume.exists()
    slurm.reset()
    sweep.hurry()
    assert_as_local(sweep.on_slurm(), resumed=[4])


def test_the_jobs_of_a_killed_driver_are_cancelled(slurm, sweep, assert_as_local):
    process = sweep.on_slurm()
    sweep.wait_for_epochs()
    process.kill()
    process.wait()
    left = {*slurm.queue()}
    assert len(left) == 3
    process = sweep.on_slurm()
    wait_for(lambda: not left & {*slurm.queue()})
    assert "of an earlier sweep" in sweep.stderr()
    sweep.wait_for_epochs()
    sweep.hurry()
    assert_as_local(process, resumed=RANKS)


def test_a_time_limit_interrupts_and_the_run_goes_on_in_another_job(sweep, local):
    process = sweep.on_slurm("--slurm", "time=1", "signal=USR1@20", ranks=(1,))
    sweep.wait_for_epochs((1,))
    first = sweep.job(1)
    wait_for(lambda: not sweep.process(1))
    assert sweep.files(1).resume.exists()
    sweep.wait_for_epochs((1,))
    assert sweep.job(1) != first
    sweep.hurry()
    assert process.wait(120) == 0, sweep.stderr()
    assert_same_run(sweep.files(1), local.files(1))
