"""The resume state holds all that a run needs to go on as if it had not stopped; nothing else is resumed from."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from steps import WEIGHT, schedule_of, update

from ks.chain.product import chain_product
from ks.files.layout import RunFiles
from ks.layer import KSLinear
from ks.moments.second_moment import UNIT_MOMENT
from ks.training.best_model import BestModel
from ks.training.optimizer import Optimizer
from ks.training.resume_state import ResumeState

SETTINGS = {"lr": 0.01, "num_epochs": 9}


class Training:
    """A chain, and everything of its run that a resume state holds."""

    def __init__(self, loss_scaling=False):
        torch.manual_seed(0)
        self.model = KSLinear(10, 6, rank=2)
        self.factors = [factor.detach().requires_grad_() for factor in self.model.factors]  # they share its memory
        self.optimizer = Optimizer("adamw", self.factors, loss_scaling=loss_scaling)
        self.schedule = schedule_of("plateau", num_epochs=9, lr=0.01, scheduler_patience=0)
        chain = SimpleNamespace(model=self.model, factors=self.factors)
        self.best = BestModel(chain, WEIGHT.double(), UNIT_MOMENT, keep_start=False)
        self.curves = []

    def epoch(self):
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(len(self.curves)))
        loss = torch.nn.functional.mse_loss(chain_product(x, self.factors), x @ WEIGHT.t())
        update(self.optimizer, loss, self.schedule.rate(len(self.curves)))
        row = {"epoch": len(self.curves) + 1, "train_loss": loss.item(), "val_loss": loss.item(), "rank": 2}
        self.curves.append(row | {"lr": 0.01, "epoch_seconds": 0.5})
        self.best.offer(loss.item(), self.curves[-1])
        self.schedule.end_epoch(loss.item())

    def parts(self):
        return self.optimizer, self.schedule, self.best


@pytest.fixture
def files(tmp_path):
    return RunFiles(tmp_path, "ks_chain", 2)


@pytest.fixture
def training():
    """After one epoch."""
    training = Training()
    training.epoch()
    return training


def offer(training, files, next_write=0.0):
    state = ResumeState(files, SETTINGS, resume=False)
    state.next_write = next_write
    state.offer(1, training.curves, *training.parts())
    return state


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_a_restored_training_goes_on_as_if_it_had_not_stopped(files, loss_scaling):
    whole = Training(loss_scaling)
    for _ in range(3):
        whole.epoch()
    offer(whole, files)
    resumed = Training(loss_scaling)
    resumed.curves = ResumeState(files, SETTINGS, resume=True).restore(*resumed.parts())
    assert (resumed.best.row, resumed.best.val_loss) == (whole.best.row, whole.best.val_loss)
    for _ in range(3):
        whole.epoch()
        resumed.epoch()
    assert resumed.curves == whole.curves
    assert resumed.schedule.state() == whole.schedule.state()
    for ours, theirs in zip(resumed.optimizer.state(), whole.optimizer.state(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(resumed.best.kept.to_dense(), whole.best.kept.to_dense())


@pytest.mark.parametrize("part", ["optimizer", "factors of the best model"])
@pytest.mark.parametrize("change", [lambda tensors: tensors[:-1], lambda tensors: [*tensors, tensors[-1]]])
def test_a_state_of_another_length_is_not_put_back(training, files, part, change, capsys):
    offer(training, files)
    state = ResumeState(files, SETTINGS, resume=True)
    holder, key = (state.found, "optimizer") if part == "optimizer" else (state.found.best, "factors")
    setattr(holder, key, change(getattr(holder, key)))
    fresh, untouched = Training(), Training()
    assert state.restore(*fresh.parts()) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"resume state {files.resume} is not valid: its tensors are those of another run; starting anew"
    assert (fresh.best.row, fresh.schedule.state()) == ({}, untouched.schedule.state())
    for ours, theirs in zip(fresh.optimizer.state(), untouched.optimizer.state(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_a_whole_state_with_the_same_settings_is_resumed_from(training, files, capsys):
    assert ResumeState(files, SETTINGS, resume=True).found is None
    offer(training, files)
    assert ResumeState(files, SETTINGS, resume=True).found.curves == training.curves
    assert ResumeState(files, SETTINGS, resume=False).found is None
    assert ResumeState(files, SETTINGS | {"lr": 0.1}, resume=True).found is None
    assert capsys.readouterr().err == ""
    files.resume.write_bytes(files.resume.read_bytes()[:1000])
    assert ResumeState(files, SETTINGS, resume=True).found is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{files.resume} cannot be read as a resume state")
    assert line.endswith("; training starts anew")


def test_a_state_waits_until_it_is_due_and_holds_the_epoch_that_was_offered(training, files):
    state = offer(training, files, next_write=math.inf)
    assert not files.resume.exists()
    before = [tensor.detach().clone() for tensor in training.optimizer.state()]
    training.epoch()
    state.write_latest()
    assert time.monotonic() < state.next_write < math.inf
    found = ResumeState(files, SETTINGS, resume=True).found
    assert len(found.curves) == 1
    for kept, tensor in zip(found.optimizer, before, strict=True):
        assert torch.equal(kept, tensor)


def test_the_state_goes_to_the_host_only_when_it_is_written(training, files):
    """A tensor on the meta device stands for one on a GPU: its copy to the host is an error."""
    training.optimizer.state = lambda: [torch.zeros(3, device="meta")]
    state = offer(training, files, next_write=math.inf)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        state.write_latest()


def test_more_epochs_are_a_new_segment(training, files):
    offer(training, files)
    for num_epochs, segment in ((9, 1), (10, 2)):
        state = ResumeState(files, SETTINGS | {"num_epochs": num_epochs}, resume=True)
        state.restore(*Training().parts())
        assert state.segment == segment
    assert ResumeState(files, SETTINGS | {"num_epochs": 8}, resume=True).found is None
