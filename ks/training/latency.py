"""The latency of inference: the trained chain and the dense layer, measured in turn on the device of the training."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ks.files.columns import BATCHES
from ks.files.schema import Latency
from ks.layer import KSLinear

READING_SECONDS = 1e-3  # short calls are repeated for so long between two readings of the clock
ROUNDS = (3, 25)  # at least and at most


def measure_latency(
    model: KSLinear, weight: torch.Tensor, dtype: torch.dtype, impl: str, threads: int, seconds: float
) -> Latency:
    """Return the median time of a forward pass of a chain and of W x, on batches of several sizes.

    A batch of which one round is expected to take more than half of `seconds` is left out, and so are larger ones.

    Args:
        model: the chain; its values do not matter.
        weight: W, shape (m, n), on the device of the model.
        dtype: of inputs and values.
        impl: backend of the chain.
        threads: of the CPU.
        seconds: to spend, about; twice as long if a single round is slow.
    """
    torch.set_num_threads(threads)
    weight, device = weight.to(dtype), weight.device
    chain = KSLinear.from_patterns(
        model.patterns, impl=impl, batch_last=model.batch_last, device=device, dtype=dtype
    ).requires_grad_(False)
    found = Latency(threads=threads, dtype=str(dtype).removeprefix("torch."), device=str(device))
    expected = 0.0
    for batch, previous in zip(BATCHES, (1, *BATCHES)):
        if expected * batch / previous > seconds / 2:
            break
        shape = (weight.shape[1], batch) if model.batch_last else (batch, weight.shape[1])
        x = torch.randn(shape, device=device).to(dtype)
        dense = functools.partial(torch.matmul, weight, x)
        if not model.batch_last:
            dense = functools.partial(torch.nn.functional.linear, x, weight)
        with torch.inference_mode():
            times = interleaved_medians((functools.partial(chain, x), dense), device, seconds / len(BATCHES))
        for name, value in zip(("latency", "dense_latency"), times):
            setattr(found, f"{name}_ms_batch_{batch}", 1e3 * value)
        expected = sum(times)
    return found


def interleaved_medians(
    functions: Sequence[Callable[[], torch.Tensor]], device: torch.device, seconds: float
) -> list[float]:
    """Return the median seconds of a call of each function; every round times all, so that noise meets them alike.

    Args:
        functions: to call.
        device: synchronised before each reading of the clock.
        seconds: after which no further round begins.
    """
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def reading(function: Callable[[], torch.Tensor], calls: int) -> float:
        synchronise()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        synchronise()
        return (time.perf_counter() - started) / calls

    for function in functions:
        function()  # the first call allocates and compiles
    calls = [max(1, min(100, int(READING_SECONDS / reading(function, 1)))) for function in functions]
    least, most = ROUNDS
    until = time.perf_counter() + seconds
    rounds: list[list[float]] = []
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() < until):
        rounds.append([reading(function, count) for function, count in zip(functions, calls)])
    return [statistics.median(values) for values in zip(*rounds)]
