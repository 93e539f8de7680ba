"""Epochs whose step is captured once as a CUDA graph and replayed: no launch by launch, no host read."""

from collections.abc import Callable
from typing import Protocol

import torch

from ks import signals
from ks.training.epochs import Epochs, Prepare, Step
from ks.training.samples import Samples


class CaptureFailed(Exception):
    """The step cannot be captured; the message has the reason."""


WARM_UPS = 3  # steps that set up libraries and allocations before a capture


class Cursor:
    """What differs from step to step, on the device.

    position: in the epoch, int64 of shape (1,). order: of the batches, int64 of shape (steps,). rates: learning rates,
    shape (steps,). results: losses and gradient norms, shape (2, steps). There is room for WARM_UPS steps at least.
    """

    def __init__(self, steps: int, device: torch.device):
        steps = max(steps, WARM_UPS)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.order = torch.zeros(steps, dtype=torch.int64, device=device)
        self.rates = torch.zeros(steps, device=device)
        self.results = torch.zeros(2, steps, device=device)


class WholeStep(Protocol):
    """A step that finds its batch and rate, writes its results and advances the position itself."""

    errors: tuple[type[Exception], ...]

    def start_epoch(self) -> None: ...

    def __call__(self, cursor: Cursor) -> None: ...


class CapturedEpochs(Epochs):
    """`Epochs` that replay a captured step.

    Args:
        step, samples, prepare: as in `Epochs`; lr comes as a scalar tensor; `prepare` runs outside the captured graph.
        state: every tensor that a step changes; put back after the warm-up that capturing needs.
        capture: turns a function without arguments into one that replays it.
        whole_step: taken instead of `step`, if given.
    Raises:
        CaptureFailed: the step cannot be captured, for instance because it reads the device.
    """

    def __init__(
        self,
        step: Step,
        samples: Samples,
        state: list[torch.Tensor],
        prepare: Prepare | None = None,
        capture: Callable | None = None,
        whole_step: WholeStep | None = None,
    ):
        super().__init__(step, samples, prepare)
        self._cursor = Cursor(samples.steps_per_epoch, samples.inputs.device)
        self._whole_step = whole_step
        before = [tensor.detach().clone() for tensor in state]
        expected: tuple[type[Exception], ...] = (RuntimeError,)  # every error of CUDA and of the capture is a plain one
        if whole_step is not None:
            expected += whole_step.errors
        try:
            self._replay = (capture or _cuda_graph)(self._take_step)
        except torch.OutOfMemoryError:
            raise
        except expected as error:
            raise CaptureFailed((str(error).strip() or type(error).__name__).splitlines()[0]) from error
        finally:
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)

    def _take_step(self):
        cursor = self._cursor
        if self._whole_step is not None:
            self._whole_step(cursor)
            return
        batch = cursor.order.index_select(0, cursor.position)
        inputs, targets = (both.index_select(0, batch)[0] for both in (self.samples.inputs, self.samples.targets))
        loss, norm = self.step(inputs, targets, cursor.rates.index_select(0, cursor.position)[0])
        cursor.results.index_copy_(1, cursor.position, torch.stack([loss, norm]).unsqueeze(1))
        cursor.position.add_(1)

    def run(self, number: int, rates: list[float]) -> torch.Tensor:
        self._cursor.order[: len(rates)].copy_(self.samples.start_epoch(number))
        self._cursor.rates[: len(rates)].copy_(torch.tensor(rates))
        self._cursor.position.zero_()
        if self._whole_step is not None:
            self._whole_step.start_epoch()
        for index in range(len(rates)):
            signals.check()
            self.prepare((number - 1) * len(rates) + index)
            self._replay()
        return self._cursor.results[:, : len(rates)].clone()


def _cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Capture `function` as a CUDA graph, after WARM_UPS runs on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def make_epochs(
    step: Step,
    samples: Samples,
    state: list[torch.Tensor],
    device: torch.device,
    prepare: Prepare | None = None,
    whole_step: WholeStep | None = None,
) -> tuple[Epochs, str, str | None]:
    """Return epochs that replay a captured step on a GPU, or plain ones on a CPU or if the capture fails.

    Returns:
        (the epochs, how their steps run, a warning or None).
    """
    if device.type != "cuda":
        return Epochs(step, samples, prepare), "one by one", None
    try:
        epochs = CapturedEpochs(step, samples, state, prepare, whole_step=whole_step)
        return epochs, f"captured as a CUDA graph{', fused' if whole_step else ''}", None
    except CaptureFailed as error:
        warning = f"the CUDA graph capture failed, so steps run one by one, which is slower: {error}"
        return Epochs(step, samples, prepare), "one by one", warning
