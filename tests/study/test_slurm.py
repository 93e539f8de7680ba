"""The SLURM launcher on a real cluster of two nodes; `make test-slurm` gives it namespaces of its own."""

import socket

import pytest
from conftest import wait_for
from two_nodes import TwoNodes

ALONE = [name for _, name in socket.if_nameindex()] == ["lo"]
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(not ALONE, reason="not in a network namespace of its own")]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    return TwoNodes(tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def slurm(cluster):
    """The cluster with an empty queue and two idle nodes."""
    cluster.reset()
    return cluster


def test_a_batch_job_runs_on_each_node(slurm):
    jobs = {node: slurm.submit("hostname", "-w", node) for node in ("n1", "n2")}
    wait_for(lambda: not slurm.queue())
    assert {node: (slurm.folder / f"{job}.out").read_text() for node, job in jobs.items()} == {
        "n1": "n1\n",
        "n2": "n2\n",
    }, slurm.logs()
