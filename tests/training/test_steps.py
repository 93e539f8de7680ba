"""Steps as they run: one by one, or captured, with the capture itself replaced: it needs a card (`make test-gpu`)."""

from types import SimpleNamespace

import pytest
import torch
from steps import make_samples, run_epoch, update

from ks import signals
from ks.errors import UsageError
from ks.training import steps
from ks.training.optimizer import Optimizer
from ks.training.steps import CapturedStep, CaptureFailed, runnable, useful_threads

IDLE = SimpleNamespace(phase=0, state=lambda: [])  # an optimizer that changes nothing


class OnACard:
    """A batch that says it is on a GPU, for the choice between the two ways."""

    def __init__(self, tensor):
        self.device = torch.device("cuda")
        self._tensor = tensor

    def clone(self):
        return self._tensor.clone()


@pytest.fixture
def card(monkeypatch):
    """Batches that seem to be on a card, whose other tensors are on the CPU."""
    zeros, full = torch.zeros, torch.full
    monkeypatch.setattr(steps.torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.setattr(steps.torch, "full", lambda *size, device=None: full(*size))
    return OnACard(torch.ones(8, 10)), torch.ones(8, 6)


def warm_up(function):
    function()
    function()
    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sampling", ["whitened", "fresh"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_captured_step_does_what_the_eager_one_does(optimizer, sampling, dtype):
    """Everything but the capture itself: here the step is replayed by calling it again."""

    def train(make):
        values = [torch.full((1, 6, 2, 1), 0.1).requires_grad_(), torch.ones(1, 2, 10, 1).requires_grad_()]
        samples = make_samples(sampling=sampling)
        optimizer_ = Optimizer(optimizer, values, loss_scaling=dtype == torch.float16)

        def step(x, y, lr):
            prediction = x @ values[1][0, :, :, 0].t() @ values[0][0, :, :, 0].t()
            loss = torch.nn.functional.mse_loss(prediction, y)
            return loss.detach(), update(optimizer_, loss, lr)

        step = make(step, samples, optimizer_.state())
        rates = [0.01 / (1 + index) for index in range(5)]
        return [*(run_epoch(step, samples, number, rates) for number in (1, 2)), *optimizer_.state()]

    eager = train(lambda step, samples, state: step)
    captured = train(lambda step, samples, state: CapturedStep(step, *samples.first(), state, capture=warm_up))
    for ours, theirs in zip(captured, eager):
        torch.testing.assert_close(ours, theirs)


def run_on_a_card(monkeypatch, card, value, error):
    """Make a step that adds 1 to `value` runnable where capturing it raises an error after one call."""

    def capture(function):
        function()
        raise error

    def step(x, y, lr):
        value.add_(1)
        return value[0], value[0]

    monkeypatch.setattr(steps, "cuda_graph", capture)
    return runnable(step, *card, SimpleNamespace(phase=0, state=lambda: [value]))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "operation not permitted when"),
        (RuntimeError(), "RuntimeError"),
        (UsageError("the criterion of train_with_random.py failed: RuntimeError: a synchronizing op"), "the criterion"),
    ],
    ids=str,
)
def test_a_capture_that_fails_leaves_no_trace_and_is_reported(monkeypatch, card, error, reason):
    value = torch.ones(1)
    _, (how, _, warning) = run_on_a_card(monkeypatch, card, value, error)
    assert value.item() == 1
    assert how == "one by one"
    assert warning.startswith(f"steps run one by one, which is slower: no CUDA graph ({reason}")
    assert "\n" not in warning


def test_a_graph_that_does_nothing_is_refused():
    """A step on another device than the current one is captured as an empty graph, of which torch only warns."""
    value = torch.ones(1)

    def capture(function):
        function()
        return lambda: None

    with pytest.raises(CaptureFailed, match="the graph is empty"):
        CapturedStep(lambda x, y, lr: (value.add_(1)[0], value[0]), *make_samples().first(), [value], capture)
    assert value.item() == 1


def test_a_card_replays_a_captured_step_and_a_cpu_takes_plain_ones(monkeypatch, card):
    monkeypatch.setattr(steps, "cuda_graph", lambda function: function)
    seen = []

    def step(x, y, lr):
        seen.append(lr)
        return torch.zeros(()), torch.zeros(())

    _, how = runnable(step, *card, IDLE)
    assert how == ("captured as a CUDA graph", "on a GPU", None)
    assert isinstance(seen.pop(), torch.Tensor)
    taken, (name, _, warning) = runnable(step, *make_samples().first(), IDLE)
    assert (name, warning) == ("one by one", None)
    taken(None, None, 0.5)
    assert seen == [0.5]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory left"), TypeError("a fault of this program"), KeyboardInterrupt("^C")]
)
def test_what_is_no_failed_capture_ends_the_run(monkeypatch, card, error):
    """Plain steps would run out of memory too, later and with less to say about it."""
    value = torch.ones(1)
    with pytest.raises(type(error)) as raised:
        run_on_a_card(monkeypatch, card, value, error)
    assert raised.value is error
    assert value.item() == 1


def test_an_interrupt_comes_before_a_step(monkeypatch):
    taken, _ = runnable(lambda *_: pytest.fail("a step was taken"), *make_samples().first(), IDLE)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(signals, "check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        taken(None, None, 0.1)


def test_small_products_use_one_thread_and_none_more_than_there_are(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [useful_threads(size) for size in (1, 2**26 - 1, 2**26, 2**60)] == [1, 1, 2, 8]
