"""Random inputs, their targets and their order."""

from contextlib import nullcontext

import pytest
import torch
from steps import WEIGHT, make_samples

from ks.moments.second_moment import SecondMoment
from ks.training import samples as module
from ks.training.samples import seeded_generator
from ks.training.whitening import whiten


def epoch(samples, number):
    """The batches of one epoch, (inputs, targets) in the order in which they come."""
    return [(x.clone(), y.clone()) for _, x, y in samples.epoch(number)]


@pytest.mark.parametrize("count", [10, 11, 20, 43])
def test_whitened_samples_have_second_moment_one(count):
    x = whiten(torch.randn(count, 10, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(x.t() @ x / count, torch.eye(10), atol=1e-4 if count < 20 else 1e-6, rtol=0)
    assert x.is_contiguous()


@pytest.mark.parametrize("sampling", ["whitened", "fresh", "fixed"])
@pytest.mark.parametrize("batch_last", [False, True])
def test_batches(sampling, batch_last):
    samples = make_samples(sampling=sampling, batch_last=batch_last)
    batches = epoch(samples, 2)
    assert len(batches) == samples.steps_per_epoch == 5
    assert samples.inputs.is_contiguous()
    for inputs, targets in batches:
        x = inputs.t() if batch_last else inputs
        assert x.shape == (8, 10)
        torch.testing.assert_close(targets, x @ WEIGHT.t())


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


def test_streams_do_not_overlap():
    draws = {
        torch.rand(1, generator=seeded_generator(seed, stream, epoch)).item()
        for seed in range(3)
        for stream in ("train", "validation", "shuffle", "init")
        for epoch in range(5)
    }
    assert len(draws) == 60


def test_validation_fractions_weigh_batches_to_the_plain_mean():
    samples = make_samples(num_validation=1500)
    means = torch.stack([targets.square().mean() for _, targets in samples.validation])
    everything = torch.cat([targets for _, targets in samples.validation])
    assert len(means) == 2
    torch.testing.assert_close(means @ samples.validation_fractions, everything.square().mean())


@pytest.mark.parametrize("sampling", ["whitened", "fresh", "fixed"])
def test_inputs_have_the_second_moment_that_is_asked_for_and_targets_follow_them(sampling):
    unit = make_samples(sampling=sampling)
    scaled = make_samples(sampling=sampling, moment=SecondMoment.isotropic(3.0))
    for number in (1, 2):
        for (inputs, targets), (unit_inputs, _) in zip(epoch(scaled, number), epoch(unit, number), strict=True):
            torch.testing.assert_close(inputs, 3 * unit_inputs)
            torch.testing.assert_close(targets, inputs @ WEIGHT.t())
    (inputs, targets), (unit_inputs, _) = scaled.validation[0], unit.validation[0]
    torch.testing.assert_close(inputs, 3 * unit_inputs)
    torch.testing.assert_close(targets, inputs @ WEIGHT.t())


@pytest.mark.parametrize("sampling", ["whitened", "fresh"])
@pytest.mark.parametrize("batch_last", [False, True])
def test_targets_come_in_the_order_of_the_outputs(sampling, batch_last):
    rows = torch.tensor([3, 0, 5, 1, 4, 2])
    samples = make_samples(sampling=sampling, batch_last=batch_last, output_rows=rows)
    validation = [(*batch, slice(None)) for batch in samples.validation]  # whose targets keep the order of W's rows
    for inputs, targets, order in [*((*batch, rows) for batch in epoch(samples, 2)), *validation]:
        x = inputs.t() if batch_last else inputs
        torch.testing.assert_close(targets, x @ WEIGHT[order].t())


@pytest.mark.parametrize("sampling", ["whitened", "fresh"])
def test_samples_are_ieee_whatever_the_environment_says(sampling, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "float32_products", lambda x, precision: seen.append(precision) or nullcontext())
    list(make_samples(sampling=sampling).epoch(2))
    assert seen == ["ieee"] * (2 if sampling == "fresh" else 1)
