"""Limits of control groups: both versions, nested groups, containers, quotas; one real group where they can be made."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from ks.files import memory
from ks.files.limits import cpu_cores, memory_left, respect_cpu_quota

GROUP, MOUNTS = "proc/self/cgroup", "proc/self/mountinfo"
VERSION_2 = {
    GROUP: "0::/slice/job/step\n",
    MOUNTS: "22 1 0:5 / /proc rw - proc proc rw\n"
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
}
STEP, JOB = "sys/fs/cgroup/slice/job/step", "sys/fs/cgroup/slice/job"
VERSION_1 = {
    GROUP: "5:memory:/uid/job\n4:cpu,cpuacct:/uid/job\n3:cpuset:/\n1:name=systemd:/\n",
    MOUNTS: "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
}
CPU, MEMORY = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/memory"
BOTH = {  # this hierarchy of version 2 has no limits
    GROUP: VERSION_1[GROUP] + "0::/user.slice\n",
    MOUNTS: VERSION_1[MOUNTS] + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
}
CONTAINER_1 = {  # the host's path is the root of the mount
    GROUP: "5:memory:/docker/1a2b\n4:cpuacct,cpu:/docker/1a2b\n",
    MOUNTS: "32 31 0:29 /docker/1a2b /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 /docker/1a2b /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
}
CONTAINER_2 = {  # the host's path leads nowhere in the container
    GROUP: "0::/../kubepods/pod_3\n",
    MOUNTS: "30 23 0:26 /kubepods/pod_3/main /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Write the files of a machine whose process is bound to eight cores; return the folder that holds proc and sys."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))

    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text))
        return tmp_path

    return make


@pytest.mark.parametrize("given", ["", "0", "many", "²"])
def test_without_groups_the_cores_that_the_process_is_bound_to_count(machine, monkeypatch, given):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    root = machine({"proc/self/status": ""})
    assert (cpu_cores(root), memory_left(root)) == (8, [])


@pytest.mark.parametrize(("quota", "cores"), [("max", 8), ("50000", 1), ("150000", 2), ("300000", 3), ("9000000", 8)])
def test_quotas_are_rounded_up_and_the_smallest_limit_of_all_levels_holds(machine, quota, cores):
    quotas = {f"{STEP}/cpu.max": "max 100000", f"{JOB}/cpu.max": f"{quota} 100000"}
    assert cpu_cores(machine(VERSION_2 | quotas)) == cores


@pytest.mark.parametrize("hierarchies", [VERSION_1, BOTH], ids=["version 1", "both"])
@pytest.mark.parametrize(("quota", "period", "cores"), [(-1, 100000, 8), (125000, 50000, 3), (10000, 100000, 1)])
def test_quotas_of_version_1(machine, hierarchies, quota, period, cores):
    quotas = {f"{CPU}/uid/cpu.cfs_quota_us": quota, f"{CPU}/uid/cpu.cfs_period_us": period}
    quotas |= {f"{CPU}/uid/job/cpu.cfs_quota_us": -1, f"{CPU}/uid/job/cpu.cfs_period_us": 100000}
    assert cpu_cores(machine(hierarchies | quotas)) == cores


def test_torch_gets_no_more_threads_than_a_quota_allows_and_else_its_own_choice(machine, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    respect_cpu_quota(machine(VERSION_2 | {f"{STEP}/cpu.max": "max 100000"}))
    assert os.environ == {}
    respect_cpu_quota(machine({f"{STEP}/cpu.max": "250000 100000"}))
    assert os.environ == {"OMP_NUM_THREADS": "3"}
    os.environ["OMP_NUM_THREADS"] = "5"  # a given number wins
    respect_cpu_quota(machine({}))
    assert os.environ == {"OMP_NUM_THREADS": "5"}
    assert cpu_cores(machine({})) == 5


def test_memory_of_every_level_is_its_limit_without_use_but_not_without_cached_files(machine):
    stat = "anon 9\ninactive_anon 9\ninactive_file 150\nactive_file 50\n"
    step, job = f"{STEP}/memory", f"{JOB}/memory"
    limits = {f"{step}.max": "max", f"{step}.high": "max", f"{step}.current": 300}
    limits |= {f"{job}.max": 1000, f"{job}.high": 900, f"{job}.current": 700, f"{job}.stat": stat}
    assert memory_left(machine(VERSION_2 | limits)) == [500, 400]


def test_memory_of_version_1_counts_the_groups_below(machine):
    stat, no_limit = "inactive_file 1\nactive_file 1\ntotal_inactive_file 150\ntotal_active_file 50\n", 2**63 - 4096
    job, user = f"{MEMORY}/uid/job/memory", f"{MEMORY}/uid/memory"
    limits = {f"{job}.limit_in_bytes": 1000, f"{job}.usage_in_bytes": 700, f"{job}.stat": stat}
    assert memory_left(machine(VERSION_1 | limits | {f"{user}.limit_in_bytes": no_limit})) == [500, no_limit]


def test_the_topmost_folder_of_a_container_is_its_own_group(machine):
    limits = {"cpu/cpu.cfs_quota_us": 200000, "cpu/cpu.cfs_period_us": 100000}
    limits |= {"memory/memory.limit_in_bytes": 1000, "memory/memory.usage_in_bytes": 1}
    root = machine(CONTAINER_1 | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()})
    assert (cpu_cores(root), memory_left(root)) == (2, [999])
    limits = {"cpu.max": "300000 100000", "memory.max": 50, "memory.current": 8}
    root = machine(CONTAINER_2 | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()})
    assert (cpu_cores(root), memory_left(root)) == (3, [42])


@pytest.mark.parametrize(("left", "available"), [([2**60, 5_000, 7_000], 5_000), ([-1], 0)])
def test_the_memory_that_is_left_in_the_groups_is_the_limit_if_it_is_the_smallest(monkeypatch, left, available):
    monkeypatch.setattr(memory, "memory_left", lambda: [2**60])
    assert 0 < memory.available_bytes() < 2**60
    monkeypatch.setattr(memory, "memory_left", lambda: left)
    assert memory.available_bytes() == available


PROGRAM = """
import os, sys
for tasks in sys.argv[1:]:
    open(tasks, "w").write(str(os.getpid()))
from ks.cli import console
from ks.files.limits import cpu_cores
from ks.files.memory import available_bytes
cores = cpu_cores()
console.begin("a script")
import torch
print(cores, torch.get_num_threads(), available_bytes())
"""


@contextlib.contextmanager
def real_group(folder: Path, limits: dict[str, int | str]):
    """Make a group in a folder of the kernel, and a group in it; return the file through which a process joins that."""
    group = folder / f"ks_test_{os.getpid()}"
    try:
        (group / "inner").mkdir(parents=True)
        for name, value in limits.items():
            (group / name).write_text(str(value))
        yield group / "inner" / "cgroup.procs"
    except OSError as error:
        pytest.skip(f"no control group with limits can be made here: {error}")
    finally:
        for made in (group / "inner", group):
            if made.exists():
                made.rmdir()


def test_a_process_in_a_real_group_of_the_kernel_sees_its_limits():
    root, limit = Path("/sys/fs/cgroup"), 400 * 2**20
    if (root / "memory").is_dir():
        groups = {root / "memory": {"memory.limit_in_bytes": limit}, root / "cpu": {"cpu.cfs_quota_us": 50000}}
    else:
        groups = {root: {"memory.max": limit, "cpu.max": "50000 100000"}}
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with contextlib.ExitStack() as stack:
        joins = [str(stack.enter_context(real_group(folder, limits))) for folder, limits in groups.items()]
        command = [sys.executable, "-c", PROGRAM, *joins]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cores, threads, available = map(int, done.stdout.split())
    assert cores == threads == 1
    assert 0 < available < limit
