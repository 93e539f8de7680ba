"""The step of the training loop as it runs: called on a CPU, captured once as a CUDA graph and replayed on a GPU."""

from collections.abc import Callable
from typing import Any

import torch

from ks import signals
from ks.errors import UsageError
from ks.training.optimizer import Optimizer

# (x, y, lr) → (loss, gradient norm), scalars on the device.
Step = Callable[[torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]

WARM_UPS = 3  # steps that set up libraries and allocations before a capture
NOT_WRITTEN = -1.0  # no gradient norm has this value


class CaptureFailed(Exception):
    """The step cannot be captured; the message has the reason."""


class CapturedStep:
    """A step that replays a CUDA graph: no launch by launch, no host read.

    Args:
        step: the step; lr comes as a scalar tensor.
        x, y: the first batch; all others have the same shapes.
        state: every tensor that the step changes; put back after the warm-up that capturing needs.
        capture: turns a function without arguments into one that replays it.
    Raises:
        CaptureFailed: the step cannot be captured, for instance because it reads the device.
    """

    def __init__(
        self, step: Step, x: torch.Tensor, y: torch.Tensor, state: list[torch.Tensor], capture: Callable | None = None
    ):
        self.step, self.x, self.y = step, x.clone(), y.clone()
        self.lr = torch.zeros((), device=x.device)
        self.results = torch.full((2,), NOT_WRITTEN, device=x.device)
        before = [tensor.detach().clone() for tensor in state]
        try:
            self._replay = (capture or cuda_graph)(self._take)
            self.results.fill_(NOT_WRITTEN)
            self._replay()
            written = self.results[1].item() != NOT_WRITTEN
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, UsageError) as error:  # every error of CUDA and of the capture is a plain RuntimeError
            raise CaptureFailed((str(error).strip() or type(error).__name__).splitlines()[0]) from error
        finally:
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        if not written:
            raise CaptureFailed("the graph is empty: the step ran on another device or stream")

    def _take(self) -> None:
        loss, norm = self.step(self.x, self.y, self.lr)
        self.results.copy_(torch.stack([loss, norm]))

    def __call__(self, x: torch.Tensor, y: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        self.x.copy_(x)
        self.y.copy_(y)
        self.lr.fill_(lr)
        self._replay()
        loss, norm = self.results.clone()
        return loss, norm


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Capture `function` as a CUDA graph, after WARM_UPS runs on a side stream.

    All runs but the first refuse to wait for the device: a capture that fails in the middle leaves torch's generators
    in a bad state, so a function that cannot be captured must be known before.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(WARM_UPS - 1):
                function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def runnable(
    step: Step, x: torch.Tensor, y: torch.Tensor, optimizer: Optimizer
) -> tuple[Step, tuple[str, str, str | None]]:
    """Return the step as it runs on the device of its batches, which may be interrupted before each call.

    Args:
        step, x, y: as in `CapturedStep`.
        optimizer: with the state that the step changes; every one of its phases has a graph of its own.
    Returns:
        (the step; how it runs, the reason, and a warning or None).
    """
    how: tuple[str, str, str | None] = ("one by one", "a CUDA graph needs a GPU", None)
    captured: dict[int, Step] = {}
    if x.device.type == "cuda":
        try:
            captured[optimizer.phase] = CapturedStep(step, x, y, optimizer.state())
            how = ("captured as a CUDA graph", "on a GPU", None)
        except CaptureFailed as error:
            how = ("one by one", "on a GPU", f"steps run one by one, which is slower: no CUDA graph ({error})")

    def interruptible(batch_x: torch.Tensor, batch_y: torch.Tensor, lr: float):
        signals.check()
        if not captured:
            return step(batch_x, batch_y, lr)
        if optimizer.phase not in captured:
            captured[optimizer.phase] = CapturedStep(step, x, y, optimizer.state())
        return captured[optimizer.phase](batch_x, batch_y, lr)

    return interruptible, how


def useful_threads(multiply_adds: int) -> int:
    """Return the number of CPU threads worth using for a forward pass of this many multiply-adds.

    Below 2^25 multiply-adds a thread, waking another thread costs more than it helps (measured at 1024 × 2048: no gain
    at rank 64 and batch 32, a factor of 1.6 at batch 256).
    """
    return max(1, min(torch.get_num_threads(), multiply_adds // 2**25))
