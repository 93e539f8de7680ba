"""Limits that control groups set on this process: containers, SLURM jobs, services. Both versions, and all levels.

A process is in one group of each hierarchy, and the limits of every group above it hold too. Version 1 has a hierarchy
for each kind of limit, version 2 one for all; a machine may have both.
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

CACHED_FILES = ("inactive_file", "active_file")  # in memory.stat: the kernel drops them when memory is needed


def cpu_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use: OMP_NUM_THREADS if set, else what the machine allows.

    That is the smallest of the cores it is bound to and of the CPU quotas of its groups, in cores and rounded up: of
    1.5 cores, one process alone would leave a third unused, and the kernel shares the quota among two.

    Args:
        root: folder that holds proc and sys.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isascii() and given.isdigit() and int(given):
        return int(given)
    return min([_bound_cores(), *_cpu_quotas(root)])


def respect_cpu_quota(root: Path = Path("/")) -> None:
    """Set OMP_NUM_THREADS where a quota allows fewer cores than this process is bound to; torch knows no quotas.

    It reads the variable when it loads. A value that is there stays.
    """
    if (cores := cpu_cores(root)) < _bound_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _bound_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_quotas(root: Path) -> Iterator[int]:
    """Yield the CPU quota of every group that has one, in cores, rounded up."""
    for version, group in _groups("cpu", root):
        if version == 2:
            quota, period = [*words_in(group / "cpu.max"), "max", ""][:2]
        else:
            quota, period = (" ".join(words_in(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):  # none is "max", or -1
            yield math.ceil(int(quota) / int(period))


def memory_left(root: Path = Path("/")) -> list[int]:
    """Return the bytes that are left below the memory limit of every group that has one.

    Args:
        root: folder that holds proc and sys.
    """
    left = []
    for version, group in _groups("memory", root):
        limits = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        numbers = [int(word) for name in limits for word in words_in(group / name) if word.isdigit()]
        in_use, prefix = ("memory.current", "") if version == 2 else ("memory.usage_in_bytes", "total_")
        cached = sum(numbers_after((prefix + kind for kind in CACHED_FILES), words_in(group / "memory.stat")))
        left += [limit - sum(map(int, words_in(group / in_use))) + cached for limit in numbers]
    return left


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield version and folder of every group whose limits hold for this process, from its own to the topmost visible.

    A container may not see its own group under the path that /proc gives: that group is then the topmost one.
    """
    own: dict[str, str] = {}  # path of the group of this process, by controller; the name of version 2 is empty
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(root / "proc/self/mountinfo"):
        place, _, source = line.partition(" - ")
        inside, mounted = place.split()[3:5]
        kind, *_, options = source.split()
        name = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if name not in own or (name and name not in options.split(",")):
            continue
        top = root / mounted.lstrip("/")
        group = top / os.path.relpath(own[name], inside)
        yield from ((1 if name else 2, folder) for folder in (group, *group.parents) if folder.is_relative_to(top))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not on Linux, or not a file of this version
        return []


def words_in(path: Path) -> list[str]:
    """Return the words of a file of the kernel; none if there is no such file."""
    return " ".join(_lines(path)).split()


def numbers_after(names: Iterable[str], words: list[str]) -> list[int]:
    """Return the number after each name that is among the words."""
    return [int(words[words.index(name) + 1]) for name in names if name in words]
