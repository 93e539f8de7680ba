"""Memory: how much is available, and a refusal before an allocation that cannot fit."""

import os
from pathlib import Path

from ks.errors import UsageError

CGROUP = Path("/sys/fs/cgroup")  # of a container, or of the whole machine, which has no limit


def available_bytes() -> int:
    """Return the bytes that this process can still allocate: the smallest of all the limits that are known."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [kib * 1024 for kib in _read_numbers("/proc/meminfo", "MemAvailable:")]
    limits += [limit - _cgroup_bytes_in_use() for limit in _read_numbers(CGROUP / "memory.max")]
    try:
        import resource  # not on Windows

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            used = _read_numbers("/proc/self/statm")
            limits.append(soft - (used[0] * os.sysconf("SC_PAGE_SIZE") if used else 0))
    except ImportError:
        pass
    return max(0, min(limits))


def _cgroup_bytes_in_use() -> int:
    """Return the memory that a container uses, without cached files, which the kernel drops when memory is needed."""
    cached = (_read_numbers(CGROUP / "memory.stat", f"\n{kind}_file ") for kind in ("inactive", "active"))
    return sum(_read_numbers(CGROUP / "memory.current")) - sum(map(sum, cached))


def _read_numbers(path: str | Path, name: str = "") -> list[int]:
    """Return the first number after `name` in a file of the kernel; empty if there is none."""
    try:
        text = Path(path).read_text()
    except OSError:
        return []
    words = text.partition(name)[2].split() if name else text.split()
    return [int(words[0])] if words and words[0].isdigit() else []


def check_fits(what: str, needed: int, remedy: str) -> None:
    """Raise UsageError, with both numbers and the remedy, if `what` needs more bytes than are available."""
    available = available_bytes()
    if needed > available:
        raise UsageError(f"{what} needs {_gib(needed)} of memory, {_gib(available)} is available; {remedy}")


def _gib(number: int) -> str:
    gib = number // 2**20 / 1024 if number < 2**100 else float("inf")
    return f"{gib:.3g} GiB" if gib < 1e6 else "more than a million GiB"
