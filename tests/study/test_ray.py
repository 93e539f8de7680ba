"""The Ray launcher on a real cluster of two nodes; `make test-ray` gives it a network of its own, loopback alone.

The nodes live in a mount namespace where the driver's folder (scripts, weight, results) is empty: nothing is shared.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import copy_toolkit, files_of, wait_for
from test_survival import assert_same_run, finish

from ks.files.curves import curves_if_any

ALONE = [name for _, name in socket.if_nameindex()] == ["lo"]
pytestmark = [pytest.mark.ray, pytest.mark.skipif(not ALONE, reason="not in a network namespace of its own")]
SWEEP = ("--ranks", "1", "2", "4", "--num_samples", "80", "--batch_size", "16", "--num_epochs", "1500", "--jobs", "2")
LONG = ("--ranks", "1", "2", "--num_samples", "80", "--num_epochs", "100000")


@pytest.fixture
def cluster(tmp_path):
    """A running cluster to which the driver's folder is an empty one."""
    pytest.importorskip("ray")
    driver = tmp_path / "driver"
    driver.mkdir(exist_ok=True)
    start = f"mount -t tmpfs none {driver} && exec {sys.executable} {Path(__file__).with_name('ray_cluster.py')}"
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", start],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_TMPDIR": "/tmp"},
    )
    process.address = process.stdout.readline().strip()
    assert process.address
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def sweep(weight_path, tmp_path):
    """Start a sweep by scripts that only the driver has."""
    driver = tmp_path / "driver"
    driver.mkdir(exist_ok=True)
    copy_toolkit(driver)
    shutil.move(weight_path, driver)

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "rank_sweep_study.py", "--weight_path", "weight.pth", *arguments],
            cwd=driver,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    return start


def on(cluster):
    return ("--launcher", "ray", "--ray_address", cluster.address)


def curves_of(folder, rank):
    return curves_if_any(files_of(folder, rank).curves_csv)


def runs_on_nodes() -> list[str]:
    """Those on nodes: their script is where Ray put it."""
    found = subprocess.run(["pgrep", "-af", "py_modules.*train_with_random"], capture_output=True, text=True).stdout
    return found.splitlines()


def test_a_node_is_lost_and_every_rank_is_trained_as_on_one_machine(cluster, sweep, tmp_path):
    local = finish(sweep(*SWEEP, "--output_dir", "local"))
    assert local.returncode == 0, local.stderr
    process = sweep(*SWEEP, *on(cluster), "--output_dir", "ray")
    wait_for(lambda: curves_of(tmp_path / "driver" / "ray", 4) and curves_of(tmp_path / "driver" / "ray", 2))
    cluster.stdin.write("kill\n")
    cluster.stdin.flush()
    killed = cluster.stdout.readline()
    assert re.search(r"--rank (2|4) ", killed)
    assert str(tmp_path) not in killed
    done = finish(process)
    assert done.returncode == 0, done.stderr
    for rank in (1, 2, 4):
        files = [files_of(tmp_path / "driver" / name, rank) for name in ("local", "ray")]
        assert_same_run(*files)
        names = [{path.name for path in run.directory.iterdir()} for run in files]
        assert names[0] == names[1]


def test_an_interrupt_ends_everything_and_the_sweep_goes_on_elsewhere(cluster, sweep, tmp_path):
    flags = (*SWEEP[:3], *SWEEP[4:8], "--num_epochs", "4000", "--output_dir", "out")
    scratch = set(Path("/tmp").glob("ks_*"))  # a killed node leaves its own
    process = sweep(*flags, *on(cluster))
    wait_for(lambda: all(curves_of(tmp_path / "driver" / "out", rank) for rank in (1, 2)))
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    done = finish(process)
    assert done.returncode == 130, done.stderr
    assert time.monotonic() - started < 30
    assert "Traceback" not in done.stderr
    assert runs_on_nodes() == []
    assert set(Path("/tmp").glob("ks_*")) == scratch
    kept = {rank: len(curves_of(tmp_path / "driver" / "out", rank)) for rank in (1, 2)}
    assert all(files_of(tmp_path / "driver" / "out", rank).resume.exists() for rank in kept)
    assert finish(sweep(*flags)).returncode == 0
    assert finish(sweep(*flags[:-1], "whole")).returncode == 0
    for rank in kept:
        assert_same_run(*(files_of(tmp_path / "driver" / name, rank) for name in ("out", "whole")))


def test_runs_end_with_a_driver_that_is_killed(cluster, sweep, tmp_path):
    process = sweep(*LONG, *on(cluster), "--output_dir", "out")
    wait_for(lambda: all(curves_of(tmp_path / "driver" / "out", rank) for rank in (1, 2)))
    assert len(runs_on_nodes()) == 2
    process.kill()
    finish(process)
    wait_for(lambda: runs_on_nodes() == [], seconds=30)


def test_a_program_error_is_not_tried_again(cluster, sweep, tmp_path):
    diverge = ("--lr", "1e30", "--optimizer", "sgd", "--max_grad_norm", "0")
    done = finish(sweep(*SWEEP[:8], "--num_epochs", "3", *diverge, *on(cluster)))
    assert done.returncode == 1
    assert done.stderr.count("diverged") >= 3
    assert "rank 4: training (1 of 3)" in done.stderr


def test_a_rank_that_hangs_is_stopped(cluster, sweep):
    done = finish(sweep(*LONG, "--timeout_per_rank", "5", *on(cluster)))
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("timed out") == 2
    assert runs_on_nodes() == []


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:9", "nowhere", "127.0.0.1:port"])
def test_no_cluster_is_one_line(sweep, tmp_path, address):
    done = finish(sweep(*SWEEP, "--launcher", "ray", "--ray_address", address))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"--ray_address {address}: this machine cannot join a cluster there (" in done.stderr
    assert not (tmp_path / "driver" / "rank_sweep_results").exists()
