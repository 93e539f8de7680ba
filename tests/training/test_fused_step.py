"""The fused step, interpreted, against the step of train_with_random.py; and the kernels that each of them launches."""

import importlib.util
import sys
from itertools import chain

import pytest
import torch
from interpreted import interpreter
from kernel_count import KernelCount
from steps import make_samples

from ks.bounds.moments import UNIT_INPUTS
from ks.patterns import make_chain
from ks.product.bmm import empty_values
from ks.product.passes import ChainPasses
from ks.training.cuda_graph import CapturedEpochs, CaptureFailed
from ks.training.fused_step import FusedStep
from ks.training.gauss_newton import GaussNewton
from ks.training.losses import squared_error_and_gradient
from ks.training.optimiser import Optimiser

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

HALF = [torch.float16, torch.bfloat16]
OPTIMISERS = ["adamw", "adam", "sgd", "gauss_newton"]
PATTERNS = make_chain(12, 16, blocks=2).patterns(2)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with interpreter("ks.training.step_kernels", "ks.product.triton_kernels") as modules:
        yield modules[0]


class Training:
    """A chain, its optimiser and its samples, all drawn alike."""

    def __init__(
        self,
        name,
        dtype=torch.float32,
        batch_last=False,
        max_grad_norm=0.5,
        weight_decay=0.1,
        patterns=PATTERNS,
        batch_size=8,
        impl="bmm",
    ):
        generator = torch.Generator().manual_seed(0)
        self.factors = [
            empty_values(pattern).copy_(torch.randn(*pattern, generator=generator) * pattern.c**-0.5)
            for pattern in patterns
        ]
        scaling = {"loss_scaling": dtype == torch.float16, "weight_decay": weight_decay}
        if name == "gauss_newton":
            self.optimiser = GaussNewton(self.factors, UNIT_INPUTS, batch_size, **scaling)
        else:
            self.optimiser = Optimiser(name, self.factors, max_grad_norm=max_grad_norm, **scaling)
        layout = {"batch_last": batch_last, "block_order": True}
        self.passes = ChainPasses(patterns, batch_size, torch.device("cpu"), dtype, impl=impl, **layout)
        order = {"output_rows": lambda batch: self.passes.output_rows, "batch_last": batch_last, "dtype": dtype}
        weight = torch.randn(patterns[0].rows, patterns[-1].cols, generator=generator) / 4
        self.samples = make_samples(weight, num_train=5 * batch_size, batch_size=batch_size, sampling="fixed", **order)
        self.dtype = dtype

    def step(self, inputs, targets, lr):
        """As in train_with_random.py."""
        values = [factor.to(self.dtype) for factor in self.factors]
        prediction, *inner = self.passes.forward(inputs, values)
        loss, gradient = squared_error_and_gradient(prediction, targets, self.optimiser.scale)
        out = {"out": self.optimiser.gradients, "scaling": self.optimiser.scaling}
        self.passes.backward(gradient, inputs, values, inner, **out)
        return loss, self.optimiser.update(lr, loss)

    def epochs(self, fused, capture=lambda function: function):
        whole_step = FusedStep(self.passes, self.optimiser, self.samples) if fused else None
        arguments = (self.step, self.samples, self.optimiser.state(), self.optimiser.prepare)
        return CapturedEpochs(*arguments, capture=capture, whole_step=whole_step)


def trained(training, fused):
    """Everything that two epochs leave, the second one after the parameters were replaced, as by a checkpoint."""
    epochs, results = training.epochs(fused), []
    for number in (1, 2):
        results.append(epochs.run(number, [1e-3 / (1 + index) for index in range(5)]))
        with torch.no_grad():
            training.factors[0].mul_(0.9)
    return [*results, *training.optimiser.state()]


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_fused_step_does_what_the_plain_one_does(name, batch_last):
    plain, fused = (trained(Training(name, batch_last=batch_last), kind) for kind in (False, True))
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_in_half_precision_too(name, dtype):
    plain, fused = (trained(Training(name, dtype), kind) for kind in (False, True))
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3 if dtype == torch.float16 else 1e-2)


def test_a_step_that_clips_nothing():
    plain, fused = (trained(Training("adamw", max_grad_norm=0.0, weight_decay=0.0), kind) for kind in (False, True))
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7)


def test_an_overflowing_step_is_skipped_and_the_scale_halved():
    training = Training("adamw", torch.float16)
    before = [tensor.clone() for tensor in [*training.factors, *chain.from_iterable(training.optimiser.moments)]]
    epochs = training.epochs(fused=True)
    training.optimiser.loss_scale.scale.fill_(2.0**40)
    epochs._take_step()
    assert training.optimiser.count.item() == 0
    assert training.optimiser.loss_scale.scale.item() == 2.0**39
    assert training.optimiser.loss_scale.found_inf.item() == 1
    for tensor, old in zip([*training.factors, *chain.from_iterable(training.optimiser.moments)], before):
        assert torch.equal(tensor, old)


def test_the_scale_doubles_after_500_good_steps():
    training = Training("sgd", torch.float16)
    epochs = training.epochs(fused=True)
    training.optimiser.loss_scale.growth.fill_(495)
    epochs.run(1, [0.0] * 5)
    assert (training.optimiser.loss_scale.scale.item(), training.optimiser.loss_scale.growth.item()) == (2.0**17, 0)


def test_the_copies_of_the_parameters_are_rounded_ones():
    training = Training("adamw", torch.bfloat16)
    epochs = training.epochs(fused=True)
    epochs.run(1, [1e-3] * 5)
    for copy, values in zip(epochs._whole_step._values, training.factors):
        assert torch.equal(copy, values.bfloat16())


def test_sums_over_more_than_one_round_of_programs(kernels):
    size = kernels.PARTS * kernels.BLOCK + 77
    flat, sums = torch.randn(size), torch.zeros(kernels.PARTS)
    kernels.norm(flat, sums)
    torch.testing.assert_close(sums.sum(), flat.square().sum())
    targets, gradient = torch.randn(2, size), torch.empty(size)
    order, position = torch.tensor([0, 1]), torch.tensor([1])
    kernels.loss(flat, targets, order, position, torch.tensor(3.0), gradient, sums)
    torch.testing.assert_close(sums.sum(), (flat - targets[1]).square().sum())
    torch.testing.assert_close(gradient, 6 / size * (flat - targets[1]))


def test_kernels_that_fail_are_a_failed_capture():
    from triton.errors import TritonError

    def capture(function):
        raise TritonError("no such instruction")

    with pytest.raises(CaptureFailed, match="no such instruction"):
        Training("adamw").epochs(fused=True, capture=capture)


# Kernels of a captured step of two factors, at most; on a GPU, a fused step in half precision has two copies fewer than
# here, because products write gradients in float32. Gauss–Newton: on a step without a refresh.
CEILINGS = {
    (False, "adamw", torch.float32): 24,
    (False, "adamw", torch.bfloat16): 29,
    (False, "adamw", torch.float16): 35,
    (False, "gauss_newton", torch.float32): 30,
    (True, "adamw", torch.float32): 10,
    (True, "adamw", torch.bfloat16): 12,
    (True, "adamw", torch.float16): 12,
    (True, "gauss_newton", torch.float32): 12,
    (True, "gauss_newton", torch.bfloat16): 13,
    (True, "gauss_newton", torch.float16): 13,
}


@pytest.mark.parametrize("case", CEILINGS, ids=str)
def test_kernels_of_a_step(kernels, case):
    fused, name, dtype = case
    sizes = {"patterns": make_chain(256, 256).patterns(16), "batch_size": 32}
    training = Training(name, dtype, weight_decay=0.0, impl="triton" if fused else "bmm", **sizes)
    epochs = training.epochs(fused)
    with KernelCount(kernels, sys.modules["ks.product.triton_kernels"]) as count:
        epochs._take_step()
    assert count.total <= CEILINGS[case], count.names
    products = 5 + 2 * (name == "gauss_newton")
    assert count.names["bmm"] + count.names["factor_kernel"] == products
    assert count.names["update_kernel"] == fused
