"""Memory: how much is available, and a refusal before an allocation that cannot fit."""

import os
from pathlib import Path

from ks.errors import UsageError
from ks.files.limits import memory_left, numbers_after, words_in


def available_bytes() -> int:
    """Return the bytes that this process can still allocate: the smallest of all the limits that are known."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [kib * 1024 for kib in numbers_after(["MemAvailable:"], words_in(Path("/proc/meminfo")))]
    limits += memory_left()
    try:
        import resource  # not on Windows

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = words_in(Path("/proc/self/statm"))[:1]  # of the address space
            limits.append(soft - sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE"))
    except ImportError:
        pass
    return max(0, min(limits))


def check_fits(what: str, needed: int, remedy: str) -> None:
    """Raise UsageError, with both numbers and the remedy, if `what` needs more bytes than are available."""
    available = available_bytes()
    if needed > available:
        raise UsageError(f"{what} needs {_gib(needed)} of memory, {_gib(available)} is available; {remedy}")


def _gib(number: int) -> str:
    gib = number // 2**20 / 1024 if number < 2**100 else float("inf")
    return f"{gib:.3g} GiB" if gib < 1e6 else "more than a million GiB"
