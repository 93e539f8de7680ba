"""Limits of control groups: both versions, nested groups, containers, quotas; one real group where they can be made."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from ks.files.limits import cpu_cores, memory_left, respect_cpu_quota

VERSION_2 = {
    "proc/self/cgroup": "0::/system.slice/job_7/step_0\n",
    "proc/self/mountinfo": "22 1 0:5 / /proc rw - proc proc rw\n"
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
}
VERSION_1 = {
    "proc/self/cgroup": "5:memory:/slurm/uid_0/job_7\n4:cpu,cpuacct:/slurm/uid_0/job_7\n3:cpuset:/\n1:name=systemd:/\n",
    "proc/self/mountinfo": "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
}
CONTAINER_1 = {  # the host's path is the root of the mount
    "proc/self/cgroup": "5:memory:/docker/1a2b\n4:cpuacct,cpu:/docker/1a2b\n",
    "proc/self/mountinfo": "32 31 0:29 /docker/1a2b /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 /docker/1a2b /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
}
CONTAINER_2 = {  # the host's path leads nowhere in the container
    "proc/self/cgroup": "0::/../kubepods/pod_3\n",
    "proc/self/mountinfo": "30 23 0:26 /kubepods/pod_3/main /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
}
BOTH = {  # this hierarchy of version 2 has no limits
    "proc/self/cgroup": VERSION_1["proc/self/cgroup"] + "0::/user.slice\n",
    "proc/self/mountinfo": VERSION_1["proc/self/mountinfo"]
    + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Write the files of a machine whose process is bound to eight cores; return the folder that holds proc and sys."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))

    def make(*layers):
        for name, text in {name: text for layer in layers for name, text in layer.items()}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def of_version_2(group, **limits):
    return {f"sys/fs/cgroup/{group}/{name.replace('__', '.')}": f"{text}\n" for name, text in limits.items()}


def of_version_1(group, quota=-1, period=100000, limit=9223372036854771712, usage=0, stat=""):
    cpu, memory = f"sys/fs/cgroup/cpu,cpuacct/{group}", f"sys/fs/cgroup/memory/{group}"
    return {
        f"{cpu}/cpu.cfs_quota_us": f"{quota}\n",
        f"{cpu}/cpu.cfs_period_us": f"{period}\n",
        f"{memory}/memory.limit_in_bytes": f"{limit}\n",
        f"{memory}/memory.usage_in_bytes": f"{usage}\n",
        f"{memory}/memory.stat": stat,
    }


def test_without_groups_the_cores_that_the_process_is_bound_to_count(machine):
    assert cpu_cores(machine({"proc/self/status": ""})) == 8
    assert memory_left(machine({})) == []


@pytest.mark.parametrize(("quota", "cores"), [("max", 8), ("50000", 1), ("150000", 2), ("300000", 3), ("9000000", 8)])
def test_quotas_are_rounded_up_and_the_smallest_limit_of_all_levels_holds(machine, quota, cores):
    own = of_version_2("system.slice/job_7/step_0", cpu__max="max 100000")
    assert cpu_cores(machine(VERSION_2, own, of_version_2("system.slice/job_7", cpu__max=f"{quota} 100000"))) == cores


@pytest.mark.parametrize(("quota", "period", "cores"), [(-1, 100000, 8), (125000, 50000, 3), (10000, 100000, 1)])
def test_quotas_of_version_1(machine, quota, period, cores):
    job = of_version_1("slurm/uid_0/job_7")
    assert cpu_cores(machine(VERSION_1, job, of_version_1("slurm/uid_0", quota, period))) == cores
    assert cpu_cores(machine(BOTH, of_version_2("unified/user.slice"))) == cores


def test_a_given_number_of_threads_wins(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert cpu_cores(machine(VERSION_2, of_version_2("system.slice/job_7/step_0", cpu__max="100000 100000"))) == 5


def test_torch_gets_no_more_threads_than_a_quota_allows_and_else_its_own_choice(machine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {})
        respect_cpu_quota(machine(VERSION_2, of_version_2("system.slice/job_7/step_0", cpu__max="max 100000")))
        assert os.environ == {}
        respect_cpu_quota(machine(VERSION_2, of_version_2("system.slice/job_7/step_0", cpu__max="250000 100000")))
        assert os.environ == {"OMP_NUM_THREADS": "3"}


def test_memory_of_every_level_is_its_limit_without_use_but_not_without_cached_files(machine):
    step = of_version_2("system.slice/job_7/step_0", memory__max="max", memory__high="max", memory__current="300")
    job = of_version_2("system.slice/job_7", memory__max="1000", memory__high="900", memory__current="700")
    job |= of_version_2("system.slice/job_7", memory__stat="anon 9\ninactive_anon 9\ninactive_file 150\nactive_file 50")
    assert memory_left(machine(VERSION_2, step, job)) == [500, 400]


def test_memory_of_version_1_counts_the_groups_below(machine):
    stat = "cache 1\ninactive_file 1\nactive_file 1\ntotal_inactive_file 150\ntotal_active_file 50\n"
    job = of_version_1("slurm/uid_0/job_7", limit=1000, usage=700, stat=stat)
    assert min(memory_left(machine(VERSION_1, job, of_version_1("slurm")))) == 500


def test_the_topmost_folder_of_a_container_is_its_own_group(machine, tmp_path):
    limits = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    limits |= {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1000", "sys/fs/cgroup/memory/memory.usage_in_bytes": "1"}
    root = machine(CONTAINER_1, limits)
    assert (cpu_cores(root), memory_left(root)) == (2, [999])
    root = machine(CONTAINER_2, of_version_2("", cpu__max="300000 100000", memory__max="50", memory__current="8"))
    assert (cpu_cores(root), memory_left(root)) == (3, [42])


REAL = Path("/sys/fs/cgroup")
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
def real_group(controller: str, limits: dict[str, str]):
    """Make a group of this machine, of version 1 or 2; return the file through which a process joins it."""
    parent = REAL / controller if (REAL / controller).is_dir() else REAL
    group = parent / f"ks_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        for name, value in limits.items():
            if not (group / name).exists():
                pytest.skip(f"this machine has no {name}")
            (group / name).write_text(value)
        (group / "inner").mkdir()
        yield group / "inner" / "cgroup.procs"
    finally:
        for folder in (group / "inner", group):
            if folder.exists():
                folder.rmdir()


def test_a_process_in_a_real_group_of_the_kernel_sees_its_limits():
    version_1 = (REAL / "memory").is_dir()
    memory = {"memory.limit_in_bytes" if version_1 else "memory.max": str(400 * 2**20)}
    cpu = {"cpu.cfs_quota_us": "50000"} if version_1 else {"cpu.max": "50000 100000"}
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with contextlib.ExitStack() as groups:
        if version_1:
            joins = [groups.enter_context(real_group(kind, each)) for kind, each in (("memory", memory), ("cpu", cpu))]
        else:
            joins = [groups.enter_context(real_group("", memory | cpu))]
        command = [sys.executable, "-c", PROGRAM, *map(str, joins)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cores, threads, available = map(int, done.stdout.split())
    assert cores == threads == 1
    assert 0 < available < 400 * 2**20
