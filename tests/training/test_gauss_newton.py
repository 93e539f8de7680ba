"""The Gauss–Newton step against dense curvature matrices, from a zero factor, with failing inverses, and its rest."""

import itertools
from math import prod

import pytest
import torch
from steps import make_samples, run_epoch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ks.chain.passes import ChainPasses
from ks.chain.patterns import make_chain
from ks.chain.reference import chain_to_dense, factor_to_dense, support
from ks.chain.split_grams import scale_gradient
from ks.layer import KSLinear
from ks.moments.metric import Metric
from ks.moments.second_moment import UNIT_MOMENT, SecondMoment
from ks.training import gauss_newton, step_sizes
from ks.training.criterion import loss_and_gradient, mean_squared_error
from ks.training.gauss_newton import GaussNewton
from ks.training.steps import CapturedStep

CHAINS = [((7, 1), (1, 9), 3), ((8, 2), (3, 6), 2), ((6, 2, 3), (2, 3, 4), 3), ((4, 2, 2, 2), (2, 2, 2, 5), 2)]


def chain_of(rows, cols, rank, seed=0):
    """Patterns and float32 values of a random chain."""
    patterns = make_chain(prod(rows), prod(cols), row_splits=rows, col_splits=cols).patterns(rank)
    model = KSLinear.from_patterns(patterns)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return patterns, [factor.detach() for factor in model.factors]


def step_of(patterns, factors, optimizer, **layout):
    passes = ChainPasses(patterns, **layout)

    def step(inputs, targets, lr):
        prediction, *inner = passes.forward(inputs, factors)
        loss, gradient = loss_and_gradient(mean_squared_error, prediction, targets, optimizer.scale(lr))
        passes.backward(gradient, inputs, factors, inner, **optimizer.destination)
        return loss, optimizer.update(lr, loss)

    return step, passes.output_rows


def coupled_moment(groups, features):
    """Inputs of second moment I within every group of features and a strong coupling between groups."""
    width = features // groups
    generator = torch.Generator().manual_seed(2)
    moment = torch.eye(features, dtype=torch.float64).view(groups, width, groups, width)
    for i, j in itertools.combinations(range(groups), 2):
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
        moment[i, :, j] = 0.9 / (groups - 1) * turn
        moment[j, :, i] = moment[i, :, j].t()
    return SecondMoment(moment.reshape(features, features))


def metric_of(patterns, coupled):
    """A metric in which C couples the column groups, and with "outputs" also G the row groups t::q."""
    if not coupled:
        return Metric()
    moment = coupled_moment(patterns[-1].a, patterns[-1].cols)
    if coupled == "inputs":
        return Metric(moment)
    grouped = coupled_moment(patterns[0].d, patterns[0].rows)
    return Metric(moment, Metric(None, grouped, 0.0).rows_in_groups(patterns[0].b), damping=0.0)


def dense_step(values, x, residual, metric):
    """The dense factors after the first step of the formula at lr = 1e-3, in float64.

    residual: ŷ − y, shape (batch, m).
    """
    moment, outputs = metric.inputs, metric.outputs.coupling(values[0].shape[3])
    (batch, m), n = residual.shape, x.shape[1]
    dense = [factor_to_dense(value.double()) for value in values]
    prefixes = list(itertools.accumulate([torch.eye(m).double(), *dense[:-1]], torch.matmul))
    suffixes = [torch.eye(n).double()]
    for factor in dense[:0:-1]:
        suffixes.insert(0, factor @ suffixes[0])
    rate = 1 / moment.largest_of_batch(batch, n)
    rates = [rate] * len(values)
    if outputs is not None:
        noise = rate * (n + values[0].shape[2]) / batch
        largest = torch.linalg.eigvalsh(outputs)[-1].item()
        rates = [rate * min(1, 0.8 / (noise * (largest if index == 0 else 1))) for index in range(len(values))]
    moved = []
    for index, (value, prefix, suffix) in enumerate(zip(values, prefixes, suffixes, strict=True)):
        gradient = (residual.double() @ prefix).t() @ (x.double() @ suffix.t()) / batch
        energies = moment.times_root(suffix) @ moment.times_root(suffix).t()
        grams = prefix.t() @ prefix if outputs is None else prefix.t() @ outputs @ prefix
        step = torch.zeros_like(dense[index])
        a, b, c, d = value.shape
        for i, t in itertools.product(range(a), range(d)):
            rows, cols = (i * size * d + torch.arange(size) * d + t for size in (b, c))
            left = grams[rows][:, rows]
            right = energies[cols][:, cols]
            if index > 0:
                left = left + 1e-3 * grams.diagonal().mean() * torch.eye(b)
            if index < len(values) - 1:
                right = right + 1e-3 * energies.diagonal().mean() * torch.eye(c)
            block = torch.linalg.solve(left, gradient[rows][:, cols])
            step[rows[:, None], cols] = torch.linalg.solve(right, block.t()).t()
        moved.append(dense[index] - rates[index] * step)
    return moved


@pytest.mark.parametrize("settings", [{}, {"measure_norm": True}], ids=["added at once", "by gradients"])
@pytest.mark.parametrize("coupled", ["", "inputs", "outputs"])
@pytest.mark.parametrize("batch", [4, 300])
@pytest.mark.parametrize("layout", [{}, {"batch_last": True}, {"block_order": True}])
@pytest.mark.parametrize("chain", CHAINS)
def test_the_step_is_that_of_dense_curvature_matrices(chain, layout, batch, coupled, settings):
    patterns, factors = chain_of(*chain)
    metric = metric_of(patterns, coupled)
    optimizer = GaussNewton(factors, metric, batch, **settings)
    step, output_rows = step_of(patterns, factors, optimizer, **layout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, patterns[-1].cols, generator=generator)
    y = torch.randn(batch, patterns[0].rows, generator=generator)
    expected = dense_step(factors, x, x.double() @ chain_to_dense([f.double() for f in factors]).t() - y, metric)
    targets = y[:, output_rows]
    optimizer.prepare(0)
    step(*(each.t().contiguous() if layout.get("batch_last") else each for each in (x, targets)), 1e-3)
    for pattern, factor, dense in zip(patterns, factors, expected, strict=True):
        torch.testing.assert_close(factor_to_dense(factor).double(), dense, rtol=1e-3, atol=5e-4)
        assert torch.equal(factor_to_dense(factor) != 0, support(pattern) != 0)


def train(capture=None, epochs=3, chain=CHAINS[1], coupled=False, settings=None, **changes):
    """Losses and final state of a short run from a zero left factor, steps captured by `capture`."""
    patterns, factors = chain_of(*chain)
    factors[0].zero_()
    moment = coupled_moment(patterns[-1].a, patterns[-1].cols) if coupled else UNIT_MOMENT
    samples = make_samples_of(patterns, moment=moment, **changes)
    run = (samples.steps_per_epoch, epochs)
    optimizer = GaussNewton(factors, moment, samples.batch_size, whitened_run=run, **settings or {})
    step, _ = step_of(patterns, factors, optimizer)
    return losses_of(step, samples, optimizer, range(1, epochs + 1), capture), optimizer


def losses_of(step, samples, optimizer, epochs, capture=None):
    captured, losses = {}, []

    def taken(x, y, lr):
        if capture is None:
            return step(x, y, lr)
        if optimizer.phase not in captured:
            captured[optimizer.phase] = CapturedStep(step, *samples.first(), optimizer.state(), capture)
        return captured[optimizer.phase](x, y, lr)

    for epoch in epochs:
        losses.append(run_epoch(taken, samples, epoch, 1e-3, optimizer.prepare)[0])
        optimizer.end_epoch()
    return torch.stack(losses)


def make_samples_of(patterns, num_train=200, **changes):
    weight = torch.randn(patterns[0].rows, patterns[-1].cols, generator=torch.Generator().manual_seed(3))
    weight *= weight.shape[0] ** 0.5 / weight.norm()
    return make_samples(weight, num_train=num_train, **changes)


def warm_up(function):
    """Everything of a capture but the capture: the step is replayed by calling it again."""
    function()
    function()
    return function


@pytest.mark.parametrize(("chain", "coupled"), [*((chain, False) for chain in CHAINS), (CHAINS[1], True)])
def test_it_trains_from_a_zero_left_factor(chain, coupled):
    losses, optimizer = train(epochs=20, chain=chain, coupled=coupled)
    assert losses[-1].mean() < 0.75 * losses[0].mean()
    assert optimizer.trouble() is None


@pytest.mark.parametrize("settings", [{}, {"loss_scaling": True}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("epochs", [3, 4])
def test_a_captured_step_does_what_the_eager_one_does(epochs, settings):
    """Also in the two epochs of least squares that end four."""
    eager, first = train(None, epochs, settings=settings)
    captured, second = train(warm_up, epochs, settings=settings)
    torch.testing.assert_close(captured, eager)
    for ours, theirs in zip(second.state(), first.state(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_step_and_a_refresh_read_nothing_of_the_device():
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    _, factors = chain_of(*CHAINS[2])
    optimizer = GaussNewton(factors, UNIT_MOMENT, 8, weight_decay=0.1, loss_scaling=True)
    with Reads():
        optimizer.refresh()
        optimizer.update(1e-3, torch.ones(()))
        assert seen == []
        optimizer.trouble()
    assert len(seen) == 1


@pytest.mark.parametrize("coupled", [False, True])
def test_a_captured_refresh_takes_its_settings_from_the_device(monkeypatch, coupled):
    """The capture is a recorded graph of operations here, which replays every number that Python gave it."""
    patterns, factors = chain_of(*CHAINS[2])
    moment = coupled_moment(patterns[-1].a, patterns[-1].cols) if coupled else UNIT_MOMENT
    eager, captured = (GaussNewton([factor.clone() for factor in factors], moment, 8) for _ in range(2))
    monkeypatch.setattr(gauss_newton, "cuda_graph", lambda function: make_fx(lambda: function())())
    captured._replay = captured._captured()
    for step in (0, 3000):
        for optimizer in (eager, captured):
            for factor in optimizer.parameters:
                factor.add_(0.1)
            optimizer.refresh(step / 4000)
        for side in ("left", "right"):
            assert all(map(torch.equal, getattr(captured.scaling, side), getattr(eager.scaling, side)))


def test_a_refresh_that_cannot_be_captured_runs_eagerly_and_is_reported_once(monkeypatch):
    _, factors = chain_of(*CHAINS[1])
    optimizer = GaussNewton(factors, UNIT_MOMENT, 8)

    def fail(function):
        function()
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(gauss_newton, "cuda_graph", fail)
    optimizer._replay = optimizer._captured()
    optimizer.refresh(0.5)
    warning = "the curvature is measured without a CUDA graph, which is slower (operation not permitted)"
    assert [optimizer.trouble(), optimizer.trouble()] == [warning, None]


@pytest.mark.parametrize("restored", [5, 9])
def test_a_restored_state_goes_on_to_the_bit(restored):
    """Over the end of the steps that all refresh, in the middle of an interval, and between epochs of least squares."""
    patterns, factors = chain_of(*CHAINS[2])
    factors[0].zero_()
    samples = make_samples_of(patterns)
    states = []
    run = {"whitened_run": (samples.steps_per_epoch, 11)}  # the last five are epochs of least squares
    for stop in (11, restored):
        own = [factor.clone() for factor in factors]
        optimizer = GaussNewton(own, UNIT_MOMENT, samples.batch_size, **run)
        step, _ = step_of(patterns, own, optimizer)
        losses_of(step, samples, optimizer, range(1, stop + 1))
        states.append([tensor.clone() for tensor in optimizer.state()])
    resumed = [factor.clone() for factor in factors]
    optimizer = GaussNewton(resumed, UNIT_MOMENT, samples.batch_size, **run)
    for tensor, value in zip(optimizer.state(), states[1], strict=True):
        tensor.copy_(value)
    step, _ = step_of(patterns, resumed, optimizer)
    losses_of(step, samples, optimizer, range(restored + 1, 12))
    assert all(map(torch.equal, optimizer.state(), states[0]))


def test_a_matrix_that_is_not_positive_definite_keeps_its_inverse_and_is_reported_once(monkeypatch):
    _, factors = chain_of(*CHAINS[1])
    optimizer = GaussNewton(factors, UNIT_MOMENT, 8)
    optimizer.refresh(0.5)
    before = [tensor.clone() for tensor in optimizer.scaling.left]
    assert optimizer.trouble() is None
    found = gauss_newton.prefix_grams

    def one_is_singular(values):
        grams = found(values)
        for i, t, value in ((0, 1, 1e6), (1, 0, float("nan"))):
            grams[0][i, 0, 1, t] = grams[0][i, 1, 0, t] = value
        return grams

    monkeypatch.setattr(gauss_newton, "prefix_grams", one_is_singular)
    for factor in factors:
        factor.mul_(2)
    optimizer.refresh(0.5)
    kept = (optimizer.scaling.left[0] == before[0]).all(1).all(1)
    assert kept.nonzero().tolist() == [[0, 1], [1, 0]]
    assert optimizer.scaling.left[0].isfinite().all()
    assert optimizer.trouble() == (
        "2 curvature matrices were not positive definite in float32; the step went on with the last good ones"
    )
    assert optimizer.trouble() is None


@pytest.mark.parametrize("rank", [64, 512])
def test_float32_inverts_the_curvature_of_a_steep_spectrum(rank):
    """Singular values k^-3 in each of the blocks, so that one direction has nearly all energy."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(1024, rank, generator=generator))[0] * torch.arange(1, rank + 1.0) ** -3
    mixed = left @ torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    factors = [mixed.reshape(1, 1024, rank, 1), torch.randn(1, rank, 1024, 1, generator=generator)]
    optimizer = GaussNewton(factors, UNIT_MOMENT, 32)
    optimizer.refresh(0.0)
    assert optimizer.trouble() is None
    gram = mixed.double().t() @ mixed.double()
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(rank)
    ours = optimizer.scaling.left[0][0, :, :, 0].double()
    assert torch.linalg.eigvalsh(ours).min() > 0
    root = torch.linalg.cholesky(gram)
    scaled = torch.linalg.eigvalsh(root.t() @ ours @ root)
    assert 0.2 < scaled.min() < scaled.max() < 1.8


def test_an_overflowing_step_changes_nothing_but_the_loss_scale():
    _, factors = chain_of(*CHAINS[1])
    optimizer = GaussNewton(factors, UNIT_MOMENT, 8, weight_decay=0.1, loss_scaling=True)
    before = [factor.clone() for factor in factors]
    optimizer.gradients[0].fill_(float("inf"))
    optimizer.update(1e-3, torch.ones(()))
    assert all(map(torch.equal, factors, before))
    assert optimizer.loss_scale.scale.item() == 2.0**15


def test_weight_decay_is_decoupled():
    _, factors = chain_of(*CHAINS[1])
    before = [factor.clone() for factor in factors]
    optimizer = GaussNewton(factors, UNIT_MOMENT, 8, weight_decay=0.5)
    optimizer.update(1e-3, torch.ones(()))
    for factor, value in zip(factors, before, strict=True):
        torch.testing.assert_close(factor, value * (1 - 0.5e-3))


def test_matrices_are_inverted_the_less_often_the_less_they_change():
    _, factors = chain_of(*CHAINS[1])
    optimizer = GaussNewton(factors, UNIT_MOMENT, 8)
    due = []

    def refresh(grown):
        due.append(step)
        optimizer._change.fill_(0.1 if step < 400 else 0.5 if step < 800 else 0.9)

    optimizer.refresh = refresh
    for step in range(1200):
        optimizer.prepare(step)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert gaps == [*(2, 4, 8, 16, 32), *[64] * gaps.count(64), *(32, 16, 8, 4, 2), *[1] * gaps.count(1)]
    assert sum(gaps[: gaps.index(16, 5)]) > 800


def test_the_change_of_a_matrix_is_that_of_its_eigenvalues():
    """(Σ (λ − 1)⁴)^(1/4), which scaling all inputs of a matrix and the size of the step leave alone."""
    _, factors = chain_of(*CHAINS[0])
    factors[1] *= torch.logspace(-1, 1, 9).unsqueeze(1)
    optimizer = GaussNewton(factors, UNIT_MOMENT, 8)
    optimizer.refresh(0.0)
    before = torch.linalg.inv(optimizer.scaling.right[0][0, :, :, 0].double())
    factors[1][0, 0] *= 1.05
    optimizer.refresh(0.5)
    gram = factors[1][0, :, :, 0].double()
    after = gram @ gram.t()
    after += 1e-3 * after.diagonal().mean() * torch.eye(3)
    expected = (torch.linalg.eigvals(torch.linalg.solve(before, after)).real - 1).pow(4).sum() ** 0.25
    assert 0.1 < expected < 0.3
    assert optimizer._change.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"measure_norm": True}], ids=["added at once", "by gradients"])
@pytest.mark.parametrize("chain", CHAINS)
def test_an_epoch_of_least_squares_solves_for_one_factor(chain, settings):
    """The right-most one in the last epoch, its left neighbour in the one before, whatever they were and the rate."""
    patterns, factors = chain_of(*chain)
    samples = make_samples_of(patterns)
    weight = chain_to_dense([factor.double() for factor in chain_of(*chain, seed=5)[1]])
    weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    samples.targets.copy_(samples.inputs @ weight.t().float())
    run = (samples.steps_per_epoch, 8)
    optimizer = GaussNewton(factors, UNIT_MOMENT, samples.batch_size, whitened_run=run, **settings)
    step, _ = step_of(patterns, factors, optimizer)
    for epoch, index in ((7, len(factors) - 2), (8, len(factors) - 1)):
        before = [factor.clone() for factor in factors]
        losses_of(step, samples, optimizer, [epoch])
        assert [torch.equal(*pair) for pair in zip(factors, before)] == [i != index for i in range(len(factors))]
        leaves = [factor.double().requires_grad_() for factor in factors]
        error = (chain_to_dense(leaves) - weight).square().sum() / 2
        gradients = torch.autograd.grad(error, leaves)
        others = torch.cat([gradient.flatten() for i, gradient in enumerate(gradients) if i != index])
        assert gradients[index].abs().max() < 1e-3 * others.abs().max()


def test_least_squares_need_as_many_epochs_as_factors_and_whitened_samples_of_white_inputs():
    patterns, factors = chain_of(*CHAINS[2])
    moment = coupled_moment(patterns[-1].a, patterns[-1].cols)

    def phases(num_epochs, metric=UNIT_MOMENT):
        optimizer = GaussNewton([factor.clone() for factor in factors], metric, 8, whitened_run=(3, num_epochs))
        found = []
        for step in range(0, 3 * num_epochs, 3):
            optimizer.prepare(step)
            found.append(optimizer.phase)
            optimizer.end_epoch()
        return found

    assert phases(8) == [0] * 4 + [3, 1, 2, 3]
    assert phases(5) == [0] * 5
    assert phases(8, moment) == [0] * 8


def growths_of(chain, moment, **settings):
    """The growth of the step of every factor after 64,000 steps: 4096 of 4097 of the most, 64 of 65 if coupled."""
    _, factors = chain_of(*chain)
    optimizer = GaussNewton(factors, moment, 8, **settings)
    gradients = [torch.randn(values.shape, generator=torch.Generator().manual_seed(4)) for values in factors]
    steps = []
    for number in (0, 64_000):
        optimizer.prepare(number)
        steps.append([scale_gradient(g, *optimizer.scaling.beside(index)) for index, g in enumerate(gradients)])
    growths = [(last.norm() / first.norm()).item() for first, last in zip(*steps, strict=True)]
    for growth, first, last in zip(growths, *steps, strict=True):
        torch.testing.assert_close(last, first * growth, rtol=1e-4, atol=1e-4)
    return growths


@pytest.mark.parametrize("chain", CHAINS[1:])
def test_the_step_of_coupled_inputs_grows_once_for_every_factor(chain):
    patterns, _ = chain_of(*chain)
    moment = coupled_moment(patterns[-1].a, patterns[-1].cols)
    step = 1 / moment.largest_of_batch(8, patterns[-1].cols)
    noise = min(0.8, step * (patterns[-1].cols + patterns[0].c) / 8)
    growth = 1 + (min(5.0, 2.0 / noise) - 1) * 64 / 65
    assert growths_of(chain, moment) == pytest.approx([growth] * len(patterns), rel=1e-4)


@pytest.mark.parametrize("chain", CHAINS[1:])
def test_the_step_of_white_inputs_grows_by_the_square_for_inner_factors_within_their_noise(monkeypatch, chain):
    patterns, _ = chain_of(*chain)
    step = 1 / UNIT_MOMENT.largest_of_batch(8, patterns[-1].cols)
    assert growths_of(chain, UNIT_MOMENT) == pytest.approx([1.0] * len(patterns))  # the step is large at once
    monkeypatch.setattr(step_sizes, "MOST_STEP", 1.5 * step)
    monkeypatch.setattr(step_sizes, "INNER_NOISE", 1.8 * step * patterns[0].c / 8)
    inner = [min(1.5**2, max(1.0, 1.8 * patterns[0].c / pattern.c)) for pattern in patterns[:-1]]
    expected = [1 + (most - 1) * 4096 / 4097 for most in (*inner, 1.5)]
    assert growths_of(chain, UNIT_MOMENT) == pytest.approx(expected, rel=1e-4)
    assert growths_of(chain, UNIT_MOMENT, rate_decays=False) == pytest.approx([1.0] * len(patterns))
