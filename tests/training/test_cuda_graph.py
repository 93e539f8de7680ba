"""Captured steps, with the capture itself replaced: it needs a card (`make test-gpu`)."""

import pytest
import torch
from steps import make_samples, update

from ks.training import cuda_graph
from ks.training.cuda_graph import CapturedEpochs, CaptureFailed, make_epochs
from ks.training.epochs import Epochs
from ks.training.optimiser import Optimiser


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sampling", ["whitened", "fresh"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_captured_step_does_what_the_eager_one_does(optimizer, sampling, dtype):
    """Everything but the capture itself: here the step is replayed by calling it again."""

    def warm_up(function):
        function()
        function()
        return function

    def train(make):
        values = [torch.full((1, 6, 2, 1), 0.1).requires_grad_(), torch.ones(1, 2, 10, 1).requires_grad_()]
        samples = make_samples(sampling=sampling)
        optimiser = Optimiser(optimizer, values, loss_scaling=dtype == torch.float16)

        def step(inputs, targets, lr):
            prediction = inputs @ values[1][0, :, :, 0].t() @ values[0][0, :, :, 0].t()
            loss = torch.nn.functional.mse_loss(prediction, targets)
            return loss.detach(), update(optimiser, loss, lr)

        epochs = make(step, samples, optimiser.state())
        results = [epochs.run(number, [0.01 / (1 + index) for index in range(5)]) for number in (1, 2)]
        return [*results, *optimiser.state()]

    eager = train(lambda step, samples, state: Epochs(step, samples))
    captured = train(lambda step, samples, state: CapturedEpochs(step, samples, state, capture=warm_up))
    for ours, theirs in zip(captured, eager):
        torch.testing.assert_close(ours, theirs)


def test_a_capture_that_fails_leaves_no_trace_and_is_said_aloud(monkeypatch):
    value = torch.ones(1, requires_grad=True)
    samples = make_samples()

    def capture(function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def step(inputs, targets, lr):
        with torch.no_grad():
            value.add_(1)
        return value.detach()[0], value.detach()[0]

    monkeypatch.setattr(cuda_graph, "_cuda_graph", capture)
    epochs, how, warning = make_epochs(step, samples, [value], torch.device("cuda"))
    assert type(epochs) is Epochs
    assert value.item() == 1
    assert how == "one by one"
    assert warning == (
        "the CUDA graph capture failed, so steps run one by one, which is slower: operation not permitted when stream "
        "is capturing"
    )
    with pytest.raises(CaptureFailed, match="^operation not permitted when stream is capturing$"):
        CapturedEpochs(step, samples, [value])
    assert value.item() == 1


def test_a_capture_that_fails_without_a_message_has_a_reason():
    def capture(function):
        raise RuntimeError

    with pytest.raises(CaptureFailed, match="^RuntimeError$"):
        CapturedEpochs(idle_step, make_samples(), [], capture=capture)


def idle_step(inputs, targets, lr):
    return torch.zeros(()), torch.zeros(())


def test_a_card_replays_a_captured_step_and_a_cpu_takes_plain_ones(monkeypatch):
    monkeypatch.setattr(cuda_graph, "_cuda_graph", lambda function: function)
    epochs, how, warning = make_epochs(idle_step, make_samples(), [], torch.device("cuda"))
    assert type(epochs) is CapturedEpochs
    assert (how, warning) == ("captured as a CUDA graph", None)
    epochs, how, warning = make_epochs(idle_step, make_samples(), [], torch.device("cpu"))
    assert type(epochs) is Epochs
    assert (how, warning) == ("one by one", None)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory left"), TypeError("a fault of this program"), KeyboardInterrupt("^C")]
)
def test_what_is_no_failed_capture_ends_the_training(monkeypatch, error):
    """Plain steps would run out of memory too, later and with less to say about it."""
    value = torch.ones(1)

    def capture(function):
        function()
        raise error

    def step(inputs, targets, lr):
        value.add_(1)
        return value[0], value[0]

    monkeypatch.setattr(cuda_graph, "_cuda_graph", capture)
    with pytest.raises(type(error)) as raised:
        make_epochs(step, make_samples(), [value], torch.device("cuda"))
    assert raised.value is error
    assert value.item() == 1
