"""The latency of inference: the trained chain, the dense layer and plain low-rank of its size, measured in turn."""

import contextlib
import functools
from collections.abc import Callable

import torch

from ks.files.columns import BATCHES
from ks.files.schema import Latency
from ks.layer import KSLinear
from ks.model.timing import interleaved_medians
from ks.training.steps import cuda_graph

THREADS = 1  # of a CPU


def measure_latency(
    model: KSLinear, weight: torch.Tensor, dtype: torch.dtype, impl: str, threads: int, seconds: float
) -> Latency:
    """Return the median time of a forward pass of a chain, of W x, and of two dense factors U V x of the chain's size.

    The three take turns on batches of several sizes, on one thread of a CPU, however many the run uses, so that all
    rows of a table compare. On a GPU, each is a CUDA graph, and the times of eager calls, launches included, stand
    beside. A batch of which one round is expected to take more than half of `seconds` is left out, and so are larger
    ones.

    Args:
        model: the chain; its values do not matter.
        weight: W, shape (m, n), on the device of the model.
        dtype: of inputs and values.
        impl: backend of the chain.
        threads: of the run, set again afterwards.
        seconds: to spend, about; twice as long if a single round is slow.
    """
    generator = torch.Generator().manual_seed(0)  # a failed capture may have left the global ones in a bad state
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
    product = torch.matmul if batch_last else lambda weight, x: torch.nn.functional.linear(x, weight)

    def times(prepare: Callable, seconds: float) -> dict[str, float]:
        found: dict[str, float] = {}
        expected = 0.0
        for batch, previous in zip(BATCHES, (1, *BATCHES)):
            if expected * batch / previous > seconds / 2:
                break
            x = normal(cols, batch) if batch_last else normal(batch, cols)
            functions = {
                "latency": functools.partial(chain, x),
                "dense_latency": functools.partial(product, weight, x),
                "lowrank_latency": lambda x=x: product(left, product(right, x)),
            }
            prepared = {name: prepare(function) for name, function in functions.items()}
            medians = interleaved_medians(prepared, device, seconds / len(BATCHES))
            found |= {f"{name}_ms_batch_{batch}": 1e3 * value for name, value in medians.items()}
            expected = sum(medians.values())
        return found

    what = {"threads": THREADS, "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    torch.set_num_threads(THREADS)
    try:
        with torch.inference_mode(), torch.cuda.device_of(weight):
            (launched, prepare), *others = launches(device).items()
            eager = times(prepare, seconds)
            for better, prepare in others:
                with contextlib.suppress(RuntimeError):  # the capture failed, or its memory did not suffice
                    return Latency(launched=better, eager=eager, **what, **times(prepare, seconds))
            return Latency(launched=launched, **what, **eager)
    finally:
        torch.set_num_threads(threads)


def launches(device: torch.device) -> dict[str, Callable]:
    """Return the ways to call a function, by name; each takes it and returns the function to be timed."""
    eager = {"eager": lambda function: function}
    return eager | ({"CUDA graph": cuda_graph} if device.type == "cuda" else {})
