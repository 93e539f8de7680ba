"""Learning rates per step."""

import pytest
import torch
from steps import schedule_of


def test_schedules():
    cosine = schedule_of("cosine", 10, 4, lr=1.0)
    assert cosine.rate(0) == 1.0
    assert cosine.rate(20) == pytest.approx(0.5)
    assert 0 < cosine.rate(39) < 0.01
    step = schedule_of("step", 10, 9, lr=1.0, step_size=2, gamma=0.1)
    assert [step.rate(number) for number in (5, 19, 20, 45)] == pytest.approx([1.0, 1.0, 0.1, 0.01])
    assert schedule_of("none", 10, 4, lr=0.3).rate(39) == 0.3


def test_plateau_reduces_after_patience_as_torch_does():
    losses = [1.0, 0.9, 0.9, 0.91, 0.92, 0.93, 0.5, 0.6, 0.6, 0.6, 0.6]
    ours = schedule_of("plateau", lr=1.0, scheduler_patience=2)
    theirs_optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs_optimizer, patience=2, factor=0.5)
    for epoch, loss in enumerate(losses, 1):
        ours.end_epoch(loss)
        theirs.step(loss)
        assert ours.rate(epoch) == theirs_optimizer.param_groups[0]["lr"]
