"""Epochs of steps, one by one; the threads that are worth using for them."""

import pytest
import torch
from steps import make_samples

from ks.training.epochs import Epochs, useful_threads


def test_small_products_use_one_thread_and_none_more_than_there_are(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [useful_threads(size) for size in (1, 2**26 - 1, 2**26, 2**60)] == [1, 1, 2, 8]


def test_an_epoch_takes_every_batch_once_in_its_order_with_its_rate():
    samples = make_samples()
    seen = []

    def step(inputs, targets, lr):
        seen.append((inputs, targets, lr))
        return inputs.sum(), targets.sum()

    rates = [0.1, 0.2, 0.3, 0.4, 0.5]
    results = Epochs(step, samples).run(2, rates)
    order = samples.start_epoch(2).tolist()
    assert sorted(order) == list(range(5))
    assert order != list(range(5))
    for (inputs, targets, lr), batch, rate in zip(seen, order, rates, strict=True):
        assert torch.equal(inputs, samples.inputs[batch])
        assert torch.equal(targets, samples.targets[batch])
        assert lr == rate
    expected = [[inputs.sum() for inputs, _, _ in seen], [targets.sum() for _, targets, _ in seen]]
    assert torch.equal(results, torch.tensor(expected))


@pytest.mark.parametrize("count", [4, 6])
def test_rates_for_another_number_of_steps_are_a_fault(count):
    with pytest.raises(ValueError, match="zip"):
        Epochs(lambda *_: (torch.zeros(()), torch.zeros(())), make_samples()).run(1, [0.1] * count)
