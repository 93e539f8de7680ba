import copy

import pytest
import torch

from ks.step import (
    CapturedEpochs,
    Epochs,
    LossScale,
    Optimiser,
    Samples,
    Schedule,
    choose_sampling,
    loss_and_gradient,
    make_epochs,
    seeded_generator,
    squared_error_and_gradient,
    useful_threads,
    whiten,
)

WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))


def make_samples(**changes):
    arguments = {"num_train": 43, "num_validation": 9, "batch_size": 8, "sampling": "whitened", "seed": 0} | changes
    return Samples(WEIGHT, **arguments)


def update(optimiser, loss, lr):
    """Backward pass by autograd, then the optimiser's update."""
    gradients = torch.autograd.grad(loss * optimiser.scale, optimiser.parameters)
    with torch.no_grad():
        for place, gradient in zip(optimiser.gradients, gradients):
            place.copy_(gradient)
        return optimiser.update(lr)


def epoch(samples, number):
    """The batches of one epoch, (inputs, targets) in the order in which they come."""
    order = samples.start_epoch(number)
    return [(samples.inputs[batch].clone(), samples.targets[batch].clone()) for batch in order]


@pytest.mark.parametrize("count", [10, 11, 20, 43])
def test_whitened_samples_have_second_moment_one(count):
    x = whiten(torch.randn(count, 10, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(x.t() @ x / count, torch.eye(10), atol=1e-4 if count < 20 else 1e-6, rtol=0)
    assert x.is_contiguous()


@pytest.mark.parametrize("num_train", [40, 43])
def test_the_full_batch_loss_of_a_whitened_set_is_the_population_loss(num_train):
    samples = make_samples(num_train=num_train)
    inputs, targets = (torch.cat(parts) for parts in zip(*epoch(samples, 1)))
    other = torch.randn(6, 10)
    loss = torch.nn.functional.mse_loss(inputs @ other.t(), targets)
    torch.testing.assert_close(loss, (WEIGHT - other).square().sum() / 6, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampling", ["whitened", "fresh", "fixed"])
@pytest.mark.parametrize("batch_last", [False, True])
def test_batches(sampling, batch_last):
    samples = make_samples(sampling=sampling, batch_last=batch_last)
    batches = epoch(samples, 2)
    assert len(batches) == samples.steps_per_epoch == 5
    assert samples.inputs.is_contiguous()
    for inputs, targets in batches:
        x, y = (inputs.t(), targets.t()) if batch_last else (inputs, targets)
        assert x.shape == (8, 10)
        torch.testing.assert_close(y, x @ WEIGHT.t())


@pytest.mark.parametrize("sampling", ["whitened", "fresh", "fixed"])
def test_an_epoch_depends_on_seed_and_number_alone(sampling):
    first, again = make_samples(sampling=sampling), make_samples(sampling=sampling)
    epoch(again, 1)
    second = epoch(first, 2)[0][0]
    assert torch.equal(second, epoch(again, 2)[0][0])
    assert not torch.equal(second, epoch(first, 3)[0][0])
    assert not torch.equal(second, epoch(make_samples(sampling=sampling, seed=1), 2)[0][0])
    assert torch.equal(first.validation[0][0], again.validation[0][0])


def test_fixed_reuses_its_set_and_fresh_does_not():
    for sampling, reused in (("fixed", True), ("whitened", True), ("fresh", False)):
        samples = make_samples(sampling=sampling, num_train=40)
        rows = [{tuple(row) for batch, _ in epoch(samples, number) for row in batch.tolist()} for number in (1, 2)]
        assert (rows[0] == rows[1]) is reused


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

    monkeypatch.setattr("ks.step._cuda_graph", capture)
    epochs, how = make_epochs(step, samples, [value], captured=True)
    assert type(epochs) is Epochs
    assert value.item() == 1
    assert how == (
        "one by one (WARNING: CUDA graph capture failed, this is slower: operation not permitted when stream is "
        "capturing)"
    )
    assert type(make_epochs(step, samples, [value], captured=False)[0]) is Epochs


def test_streams_do_not_overlap():
    draws = {
        torch.rand(1, generator=seeded_generator(seed, stream, epoch)).item()
        for seed in range(3)
        for stream in ("train", "validation", "shuffle", "init")
        for epoch in range(5)
    }
    assert len(draws) == 60


def test_validation_shares_weigh_batches_to_the_plain_mean():
    samples = make_samples(num_validation=1500)
    means = torch.stack([targets.square().mean() for _, targets in samples.validation])
    everything = torch.cat([targets for _, targets in samples.validation])
    assert len(means) == 2
    torch.testing.assert_close(means @ samples.validation_shares, everything.square().mean())


def test_sampling_choice():
    assert choose_sampling("auto", 10, 10)[0] == "whitened"
    assert choose_sampling("auto", 9, 10)[0] == "fresh"
    assert choose_sampling("fixed", 9, 10)[0] == "fixed"
    with pytest.raises(ValueError, match="needs at least 10 training samples"):
        choose_sampling("whitened", 9, 10)


def test_schedules():
    cosine = Schedule("cosine", 1.0, 10, 4)
    assert cosine.rate(1, 0) == 1.0
    assert cosine.rate(3, 0) == pytest.approx(0.5)
    assert 0 < cosine.rate(4, 9) < 0.01
    step = Schedule("step", 1.0, 10, 9, step_size=2, gamma=0.1)
    assert [step.rate(epoch, 5) for epoch in (1, 2, 3, 5)] == pytest.approx([1.0, 1.0, 0.1, 0.01])
    assert Schedule("none", 0.3, 10, 4).rate(4, 9) == 0.3


def test_plateau_reduces_after_patience_as_torch_does():
    losses = [1.0, 0.9, 0.9, 0.91, 0.92, 0.93, 0.5, 0.6, 0.6, 0.6, 0.6]
    ours = Schedule("plateau", 1.0, 1, 20, patience=2, factor=0.5)
    theirs_optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs_optimizer, patience=2, factor=0.5)
    for epoch, loss in enumerate(losses, 1):
        ours.end_epoch(loss)
        theirs.step(loss)
        assert ours.rate(epoch + 1, 0) == theirs_optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_updates_equal_those_of_torch_optim(name):
    """The library's optimiser, told the per-factor rates, on the same clipped gradients."""
    ours = [torch.randn(2, 3, 4, 1, requires_grad=True), torch.randn(1, 2, 9, 3, requires_grad=True)]
    theirs = copy.deepcopy(ours)
    optimiser = Optimiser(name, ours, weight_decay=0.1, max_grad_norm=0.5)
    rates = [0.01 * factor for factor in optimiser.rate_factors]
    decays = [0.1 / factor if name == "adamw" else 0.1 for factor in optimiser.rate_factors]
    groups = [{"params": [p], "lr": lr, "weight_decay": decay} for p, lr, decay in zip(theirs, rates, decays)]
    library = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
        "adam": lambda: torch.optim.Adam(groups, betas=(0.9, 0.95)),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
    }[name]()
    for _ in range(4):
        norm = update(optimiser, sum((p**2).sum() for p in ours), 0.01)
        library.zero_grad()
        sum((p**2).sum() for p in theirs).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        library.step()
        torch.testing.assert_close(norm, expected_norm)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_written_out_gradient_is_that_of_autograd(dtype):
    prediction, target = torch.randn(5, 7).to(dtype), torch.randn(5, 7)
    ours = squared_error_and_gradient(prediction, target, torch.tensor(4.0))
    theirs = loss_and_gradient(torch.nn.functional.mse_loss, prediction, target, 4.0)
    for mine, other in zip(ours, theirs):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other)


def test_an_overflowing_step_is_skipped_and_the_scale_halved():
    parameter = torch.ones(1, 1, 1, 1, requires_grad=True)
    optimiser = Optimiser("adamw", [parameter], loss_scaling=True)
    update(optimiser, (parameter * 1e36 * 1e3).sum(), 0.1)
    assert parameter.item() == 1.0
    assert optimiser.count.item() == 0.0
    assert optimiser.loss_scale.scale.item() == 2.0**15
    update(optimiser, (parameter * 3.0).sum(), 0.001)
    assert parameter.item() == pytest.approx(0.9)


def test_loss_scale_unscales():
    scale = LossScale("cpu")
    gradient = torch.full((2,), 2.0**16)
    assert scale.unscale(gradient).item() == 0.0
    assert torch.equal(gradient, torch.ones(2))


def test_small_products_use_one_thread_and_none_more_than_there_are(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [useful_threads(size) for size in (1, 2**26 - 1, 2**26, 2**60)] == [1, 1, 2, 8]
