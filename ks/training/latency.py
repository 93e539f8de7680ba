"""The latency of inference: the trained chain, the dense layer and plain low-rank of its size, measured in turn."""

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
THREADS = 1  # of a CPU


def measure_latency(
    model: KSLinear, weight: torch.Tensor, dtype: torch.dtype, impl: str, threads: int, seconds: float
) -> Latency:
    """Return the median time of a forward pass of a chain, of W x, and of two dense factors U V x of the chain's size.

    They take turns on batches of several sizes, on one thread of a CPU whatever the training uses, so that all rows of
    a table compare; on a GPU eagerly, launches included. A batch of which one round is expected to take more than half
    of `seconds` is left out, and so are larger ones.

    Args:
        model: the chain; its values do not matter.
        weight: W, shape (m, n), on the device of the model.
        dtype: of inputs and values.
        impl: backend of the chain.
        threads: of the training, set again afterwards.
        seconds: to spend, about; twice as long if a single round is slow.
    """
    generator = torch.Generator().manual_seed(0)  # whatever became of the global ones
    weight, device, batch_last = weight.to(dtype), weight.device, model.batch_last
    rows, cols = weight.shape

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    chain = KSLinear.uninitialised(model.patterns, impl=impl, batch_last=batch_last, device=device, dtype=dtype)
    chain.requires_grad_(False)
    for block in chain.blocks:
        block.copy_(normal(*block.shape) * block.shape[1] ** -0.5)
    rank = max(1, sum(block.numel() for block in chain.blocks) // (rows + cols))
    left, right = normal(rows, rank), normal(rank, cols)
    found = Latency(threads=THREADS, dtype=str(dtype).removeprefix("torch."), device=str(device))
    torch.set_num_threads(THREADS)
    try:
        expected = 0.0
        for batch, previous in zip(BATCHES, (1, *BATCHES)):
            if expected * batch / previous > seconds / 2:
                break
            x = normal(cols, batch) if batch_last else normal(batch, cols)
            product = torch.matmul if batch_last else _linear
            functions = (
                functools.partial(chain, x),
                functools.partial(product, weight, x),
                lambda x=x, product=product: product(left, product(right, x)),
            )
            with torch.inference_mode():
                times = interleaved_medians(functions, device, seconds / len(BATCHES))
            for name, value in zip(("latency", "dense_latency", "lowrank_latency"), times, strict=True):
                setattr(found, f"{name}_ms_batch_{batch}", 1e3 * value)
            expected = sum(times)
    finally:
        torch.set_num_threads(threads)
    return found


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def interleaved_medians(
    functions: Sequence[Callable[[], torch.Tensor]], device: torch.device, seconds: float
) -> list[float]:
    """Return the median seconds of a call of each function; every round times all, so that noise meets them alike.

    Args:
        functions: to call.
        device: synchronised before each reading of the clock.
        seconds: after which no further round begins.
    """

    def synchronise():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

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
