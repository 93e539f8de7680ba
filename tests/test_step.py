import copy

import pytest
import torch

from ks.step import LossScale, Optimiser, Samples, Schedule, choose_sampling, seeded_generator, useful_threads, whiten

WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))


def make_samples(**changes):
    arguments = {"num_train": 43, "num_validation": 9, "batch_size": 8, "sampling": "whitened", "seed": 0} | changes
    return Samples(WEIGHT, **arguments)


@pytest.mark.parametrize("count", [10, 11, 43])
def test_whitened_samples_have_second_moment_one(count):
    x = whiten(torch.randn(count, 10, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(x.t() @ x / count, torch.eye(10), atol=1e-4, rtol=0)
    assert x.is_contiguous()


def test_the_full_batch_loss_of_a_whitened_set_is_the_population_loss():
    samples = make_samples(num_train=40)
    inputs, targets = (torch.cat(parts) for parts in zip(*samples.epoch(1)))
    other = torch.randn(6, 10)
    loss = torch.nn.functional.mse_loss(inputs @ other.t(), targets)
    torch.testing.assert_close(loss, (WEIGHT - other).square().sum() / 6, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampling", ["whitened", "fresh", "fixed"])
@pytest.mark.parametrize("batch_last", [False, True])
def test_batches(sampling, batch_last):
    samples = make_samples(sampling=sampling, batch_last=batch_last)
    batches = samples.epoch(1)
    assert len(batches) == samples.steps_per_epoch == 5
    for inputs, targets in batches:
        assert inputs.is_contiguous()
        x, y = (inputs.t(), targets.t()) if batch_last else (inputs, targets)
        assert x.shape == (8, 10)
        torch.testing.assert_close(y, x @ WEIGHT.t())


@pytest.mark.parametrize("sampling", ["whitened", "fresh", "fixed"])
def test_an_epoch_depends_on_seed_and_number_alone(sampling):
    first, again = make_samples(sampling=sampling), make_samples(sampling=sampling)
    again.epoch(1)
    assert torch.equal(first.epoch(2)[0][0], again.epoch(2)[0][0])
    assert not torch.equal(first.epoch(1)[0][0], first.epoch(2)[0][0])
    assert not torch.equal(first.epoch(2)[0][0], make_samples(sampling=sampling, seed=1).epoch(2)[0][0])
    assert torch.equal(first.validation[0][0], again.validation[0][0])


def test_fixed_reuses_its_set_and_fresh_does_not():
    for sampling, reused in (("fixed", True), ("whitened", True), ("fresh", False)):
        samples = make_samples(sampling=sampling, num_train=40)
        rows = [{tuple(row) for batch, _ in samples.epoch(number) for row in batch.tolist()} for number in (1, 2)]
        assert (rows[0] == rows[1]) is reused


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
        norm = optimiser.step(sum((p**2).sum() for p in ours), 0.01)
        library.zero_grad()
        sum((p**2).sum() for p in theirs).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        library.step()
        torch.testing.assert_close(norm, expected_norm)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other)


def test_an_overflowing_step_is_skipped_and_the_scale_halved():
    parameter = torch.ones(1, 1, 1, 1, requires_grad=True)
    optimiser = Optimiser("adamw", [parameter], loss_scaling=True)
    optimiser.step((parameter * 1e36 * 1e3).sum(), 0.1)
    assert parameter.item() == 1.0
    assert optimiser.counts[0].item() == 0.0
    assert optimiser.loss_scale.scale.item() == 2.0**15
    optimiser.step((parameter * 3.0).sum(), 0.001)
    assert parameter.item() == pytest.approx(0.9)


def test_loss_scale_unscales():
    scale = LossScale("cpu")
    gradients = (torch.full((2,), 2.0**16),)
    assert scale.unscale(gradients).item() == 0.0
    assert torch.equal(gradients[0], torch.ones(2))


def test_small_products_use_one_thread_and_none_more_than_there_are(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [useful_threads(size) for size in (1, 2**26 - 1, 2**26, 2**60)] == [1, 1, 2, 8]
