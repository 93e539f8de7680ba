"""The time of calls that are measured in turns."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

READING_SECONDS = 1e-3  # short calls are repeated for so long between two readings of the clock
ROUNDS = (3, 25)  # at least and at most


def interleaved_medians(
    functions: Mapping[str, Callable],
    device: torch.device,
    seconds: float = math.inf,
    *,
    rounds: tuple[int, int] = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of a call of each function; every round times all of them.

    Args:
        functions: to call, by name.
        device: synchronised before each reading of the clock.
        seconds: after which no further round begins.
        rounds: at least and at most, after one that does not count.
        clock: time.process_time leaves out the time of other programs on the machine.
    """
    synchronise = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def reading(function: Callable, calls: int) -> float:
        synchronise()
        started = clock()
        for _ in range(calls):
            function()
        synchronise()
        return (clock() - started) / calls

    for function in functions.values():
        function()  # the first call allocates and compiles
    calls = {name: max(1, min(500, int(READING_SECONDS / reading(f, 2)))) for name, f in functions.items()}
    until = time.perf_counter() + seconds
    found: list[list[float]] = []
    while len(found) < rounds[0] or (len(found) < rounds[1] and time.perf_counter() < until):
        found.append([reading(function, calls[name]) for name, function in functions.items()])
    return dict(zip(functions, map(statistics.median, zip(*found))))
