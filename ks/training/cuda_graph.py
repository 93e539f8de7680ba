"""Epochs whose step is captured once as a CUDA graph and replayed: no launch by launch, no host read."""

from collections.abc import Callable

import torch

from ks import signals
from ks.training.epochs import Epochs, Prepare, Step
from ks.training.samples import Samples


class CaptureFailed(Exception):
    """The step cannot be captured; the message has the reason."""


class CapturedEpochs(Epochs):
    """`Epochs` that replay a captured step.

    Everything that differs from step to step is on the device: the position in the epoch, the order of the batches, the
    learning rates and the results.

    Args:
        step, samples, prepare: as in `Epochs`; lr comes as a scalar tensor; `prepare` runs outside the captured graph.
        state: every tensor that a step changes; put back after the warm-up that capturing needs.
        capture: turns a function without arguments into one that replays it.
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
    ):
        super().__init__(step, samples, prepare)
        device, steps = samples.inputs.device, samples.steps_per_epoch
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._order = torch.zeros(steps, dtype=torch.int64, device=device)
        self._rates = torch.zeros(steps, device=device)
        self._results = torch.zeros(2, steps, device=device)
        before = [tensor.detach().clone() for tensor in state]
        try:
            self._replay = (capture or _cuda_graph)(self._take_step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # every error of CUDA and of the capture is a plain one
            raise CaptureFailed((str(error).strip() or type(error).__name__).splitlines()[0]) from error
        finally:
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)

    def _take_step(self):
        batch = self._order.index_select(0, self._position)
        inputs, targets = (both.index_select(0, batch)[0] for both in (self.samples.inputs, self.samples.targets))
        loss, norm = self.step(inputs, targets, self._rates.index_select(0, self._position)[0])
        self._results.index_copy_(1, self._position, torch.stack([loss, norm]).unsqueeze(1))
        self._position.add_(1).remainder_(len(self._order))

    def run(self, number: int, rates: list[float]) -> torch.Tensor:
        self._order.copy_(self.samples.start_epoch(number))
        self._rates.copy_(torch.tensor(rates))
        self._position.zero_()
        for index in range(len(rates)):
            signals.check()
            self.prepare((number - 1) * len(rates) + index)
            self._replay()
        return self._results.clone()


def _cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Capture `function` as a CUDA graph, after three runs on a side stream that set up libraries and allocations."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def make_epochs(
    step: Step, samples: Samples, state: list[torch.Tensor], device: torch.device, prepare: Prepare | None = None
) -> tuple[Epochs, str, str | None]:
    """Return epochs that replay a captured step on a GPU, or plain ones on a CPU or if the capture fails.

    Returns:
        (the epochs, how their steps run, a warning or None).
    """
    if device.type != "cuda":
        return Epochs(step, samples, prepare), "one by one", None
    try:
        return CapturedEpochs(step, samples, state, prepare), "captured as a CUDA graph", None
    except CaptureFailed as error:
        warning = f"the CUDA graph capture failed, so steps run one by one, which is slower: {error}"
        return Epochs(step, samples, prepare), "one by one", warning
