"""Learning rates per step."""

import pytest
import torch

from ks.training.schedule import Schedule


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


def test_a_restored_plateau_goes_on_as_if_it_had_not_stopped():
    losses = [1.0, 0.9, 0.91, 0.92, 0.93, 0.5, 0.6, 0.6]
    whole, stopped = (Schedule("plateau", 1.0, 1, 20, patience=1, factor=0.5) for _ in range(2))
    rates = []
    for epoch, loss in enumerate(losses, 1):
        whole.end_epoch(loss)
        resumed = Schedule("plateau", 1.0, 1, 20, patience=1, factor=0.5)
        resumed.restore(stopped.state())
        resumed.end_epoch(loss)
        stopped = resumed
        rates.append((whole.rate(epoch + 1, 0), resumed.rate(epoch + 1, 0)))
    assert all(ours == theirs for ours, theirs in rates)
    assert rates[-1][0] < 1.0
