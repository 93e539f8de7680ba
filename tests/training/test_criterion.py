"""Edited criteria train exactly: the gradient of one step is that of autograd on the dense reference."""

import math

import pytest
import torch
from layer_rows import problem_of
from torch.nn import functional

from ks.chain.reference import chain_to_dense
from ks.errors import UsageError
from ks.training.criterion import GuardedMetrics, averages, check_edits, loss_and_gradient, loss_of, mean_squared_error
from ks.training.criterion_identity import TOOLKIT, Edits
from ks.training.optimizer import Optimizer
from ks.training.samples import make_samples
from ks.training.trainable_chain import TrainableChain


def masked(prediction, target):
    """Every second output counts."""
    return (prediction - target)[:, ::2].square().mean()


def relative(prediction, target):
    return (prediction - target).square().sum() / target.square().sum()


EDITED = {"masked": masked, "relative": relative, "huber": torch.nn.HuberLoss(delta=0.3)}
CHAINS = {"grid": [], "low-rank": ["--chain", "lowrank"], "three factors": ["--chain", "butterfly"]}


WEIGHT = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
FIXED = ("--rank", 3, "--num_samples", 120, "--sampling", "fixed")


@pytest.mark.parametrize("layout", [(), ("--bs_last",)], ids=["batch first", "features first"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("shape", [(24, 16), (1024, 2048)], ids=str)
@pytest.mark.parametrize("name", [*EDITED, "mean squared error"])
def test_the_gradient_of_a_step_is_that_of_the_dense_reference(tmp_path, name, shape, chain, layout):
    criterion = EDITED.get(name, mean_squared_error)
    edits = Edits(name) if name in EDITED else TOOLKIT
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    config, problem = problem_of(tmp_path, *FIXED, *CHAINS[chain], *layout, weight=weight, edits=edits)
    weight = problem.internal_weight()
    trained = TrainableChain(config, problem, weight)
    generator = torch.Generator().manual_seed(2)
    for factor in trained.factors:
        factor.copy_(torch.randn(factor.shape, generator=generator) * factor.shape[2] ** -0.5)
    samples = make_samples(config, problem, weight, trained.output_rows)
    optimizer = Optimizer("sgd", trained.factors)
    _, x, y = next(iter(samples.epoch(1)))
    loss, gradient = loss_and_gradient(criterion, trained(x), y)
    trained.backward(gradient, optimizer)

    factors = [factor.double().requires_grad_() for factor in trained.factors]
    inputs = (x.t() if config.bs_last else x).double()
    expected = criterion(inputs @ chain_to_dense(factors).t(), inputs @ weight.t())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for ours, factor in zip(optimizer.gradients, factors, strict=True):
        error = (ours - factor.grad).norm() / factor.grad.norm()
        assert error < 1e-4


@pytest.mark.parametrize("layout", [(), ("--bs_last",)], ids=["batch first", "features first"])
def test_the_prediction_of_validation_batches_is_in_the_order_of_the_rows(tmp_path, layout):
    config, problem = problem_of(tmp_path, *FIXED, *layout, weight=WEIGHT)
    weight = problem.internal_weight()
    trained = TrainableChain(config, problem, weight)
    trained.factors[0].normal_()
    samples = make_samples(config, problem, weight, trained.output_rows)
    ((x, y),) = samples.validation
    inputs = x.t() if config.bs_last else x
    torch.testing.assert_close(trained.predict(x), inputs @ chain_to_dense(trained.factors).t())
    torch.testing.assert_close(y, inputs @ weight.t().float())
    assert trained.output_rows.tolist() != list(range(24))  # training batches of our own criterion are in another one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_written_out_gradient_is_that_of_autograd(dtype):
    prediction, target = torch.randn(5, 7).to(dtype), torch.randn(5, 7)
    ours = loss_and_gradient(mean_squared_error, prediction, target, torch.tensor(4.0))
    theirs = loss_and_gradient(functional.mse_loss, prediction, target, 4.0)
    for mine, other in zip(ours, theirs):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other)


def failing(prediction, target):
    raise ArithmeticError("no sums\ntoday")


def without_gradient(prediction, target):
    return (prediction - target).square().mean().detach()


def in_place(prediction, target):
    return (target.sub_(prediction)).square().mean()


BAD = {
    "raises": (failing, r"failed at test_criterion\.py:\d+: ArithmeticError: no sums today"),
    "a vector": (lambda p, t: (p - t).square().mean(0), r"returned shape \(7,\) instead of a scalar tensor"),
    "a number": (lambda p, t: 1.0, "returned float instead of a scalar tensor"),
    "no gradient": (without_gradient, "has no gradient for the prediction"),
    "another device": (lambda p, t: (p - t.to("meta")).mean(), r"failed at test_criterion\.py:\d+: "),
    "changes the target": (in_place, "changes its target in place"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_criterion_that_fails_ends_in_one_line(case):
    criterion, message = BAD[case]
    with pytest.raises(UsageError, match=f"^the criterion of train_with_random.py .*{message}") as raised:
        loss_and_gradient(criterion, torch.randn(5, 7), torch.randn(5, 7))
    assert "\n" not in str(raised.value)


def test_running_out_of_memory_is_no_fault_of_a_criterion():
    def hungry(prediction, target):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        loss_of(hungry, torch.ones(2, 3), torch.ones(2, 3))


def test_a_module_is_put_on_the_device_and_another_function_than_the_source_has_is_refused(tmp_path):
    _, problem = problem_of(tmp_path, edits=Edits("mine"))
    module = torch.nn.HuberLoss()
    module.to = lambda device: seen.append(device)
    seen = []
    check_edits(module, lambda p, t: {}, problem)
    assert seen == [torch.device("cpu")]
    with pytest.raises(UsageError, match="is not what its source says"):
        check_edits(mean_squared_error, lambda p, t: {}, problem)
    _, problem = problem_of(tmp_path)
    with pytest.raises(UsageError, match=r"is not what its source says \(mean_squared_error\); assign it once"):
        check_edits(functional.mse_loss, lambda p, t: {}, problem)


@pytest.mark.parametrize("name", ["val_loss", "a b", 3])
def test_a_name_that_a_metric_cannot_have_is_refused_before_the_run(tmp_path, name):
    _, problem = problem_of(tmp_path)
    with pytest.raises(UsageError, match="metric"):
        check_edits(mean_squared_error, lambda p, t: {name: p.mean()}, problem)
    check_edits(mean_squared_error, failing, problem)  # costs its column alone


def test_a_metric_that_fails_stays_empty_with_one_warning():
    warnings = []

    def metrics(prediction, target):
        return {"mean": prediction.mean(), "number": 2, "vector": prediction[0], "text": "x", "rank": target.mean()}

    measured = GuardedMetrics(metrics, warnings.append)
    for _ in range(2):
        found = measured(torch.ones(2, 3), torch.ones(2, 3))
        assert {name: metric.item() for name, metric in found.items()} == {"mean": 1.0, "number": 2.0}
    assert [warning.split()[:2] for warning in warnings] == [
        ["metric", "'vector'"],
        ["metric", "'text'"],
        ["metric", "'rank'"],
    ]
    failed = GuardedMetrics(failing, warnings.append)
    assert failed(torch.ones(2, 3), torch.ones(2, 3)) == failed(torch.ones(2, 3), torch.ones(2, 3)) == {}
    place = f"test_criterion.py:{failing.__code__.co_firstlineno + 1}"
    assert warnings[3:] == [
        f"metrics of train_with_random.py stay empty, because they failed at {place}: ArithmeticError: no sums today"
    ]


def test_averages_are_over_samples_not_batches():
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    found = averages([{"a": one, "b": one}, {"a": two}], torch.tensor([0.75, 0.25]))
    assert found == {"a": 1.25, "b": None}
    assert math.isnan(averages([{"a": torch.tensor(math.nan)}], torch.ones(1))["a"])
