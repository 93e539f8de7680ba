"""The problem that the flags describe: samples and moments in the coordinates of a run, and flags that go together."""

import numpy as np
import pytest
import torch
from conftest import save_moments
from layer_rows import KINDS, WEIGHT, layer_rows, problem_of, second_moment

from ks.bounds.population_loss import population_loss
from ks.errors import UsageError
from ks.layer import KSLinear
from ks.moments.second_moment import SecondMoment
from ks.training.problem import choose_sampling
from ks.training.samples import make_samples

UNSEEN = layer_rows("regular", seed=1)


def moments(folder, kind="regular"):
    return save_moments(folder / "x.safetensors", layer_rows(kind), UNSEEN)


def samples_file(folder, rows):
    np.save(folder / "x.npy", rows.numpy())
    return folder / "x.npy"


def random_chain(problem):
    torch.manual_seed(0)
    return KSLinear.from_patterns(problem.chain.patterns(2), dtype=torch.float64)


@pytest.mark.parametrize(
    "flags", [(), ("--fit_bias",), ("--chain", "lowrank_butterfly"), ("--chain", "lowrank")], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_held_out_samples_have_exactly_the_held_out_second_moment_and_loss(tmp_path, kind, flags):
    config, problem = problem_of(tmp_path, "--inputs", moments(tmp_path, kind), *flags)
    mean = layer_rows(kind).mean(0) if config.fit_bias else torch.zeros(24).double()
    inputs, targets = problem.held_out_samples()
    torch.testing.assert_close(problem.held_out_energies(), inputs.square().mean(0))
    assert inputs.shape == (24, 24)
    torch.testing.assert_close(second_moment(inputs), second_moment(problem.coordinates.samples(UNSEEN - mean)))
    energy = SecondMoment(second_moment(layer_rows(kind))).output_energy(WEIGHT) / 16
    torch.testing.assert_close(
        targets.t() @ targets / 24, WEIGHT.double() @ second_moment(UNSEEN - mean) @ WEIGHT.double().t() / energy
    )
    model = random_chain(problem)
    on_samples = (model(inputs) - targets).square().mean().item()
    assert problem.held_out_loss(model) == pytest.approx(on_samples, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_training_samples_have_exactly_the_second_moment_of_the_inputs(tmp_path, kind):
    config, problem = problem_of(tmp_path, "--inputs", moments(tmp_path, kind))
    assert problem.sampling == "whitened"
    weight = problem.internal_weight()
    samples = make_samples(config, problem, weight)
    inputs, targets = (batches.flatten(0, 1).double() for batches in (samples.inputs, samples.targets))
    torch.testing.assert_close(second_moment(inputs), problem.metric.inputs.matrix, rtol=0, atol=1e-4)
    torch.testing.assert_close(targets, inputs @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fit_bias", [(), ("--fit_bias",)], ids=str)
def test_fixed_sampling_trains_on_the_given_rows(tmp_path, fit_bias):
    rows = layer_rows("regular", 100)
    config, problem = problem_of(
        tmp_path, "--inputs", samples_file(tmp_path, rows), "--sampling", "fixed", "--batch_size", 16, *fit_bias
    )
    assert problem.num_train == 80  # the others are held out
    samples = make_samples(config, problem, problem.internal_weight())
    mean = rows[:80].mean(0) if fit_bias else 0
    expected = problem.coordinates.samples(rows[:80] - mean)
    torch.testing.assert_close(samples.inputs.flatten(0, 1), expected.float())
    targets = (rows[:80] - mean) @ WEIGHT.double().t() / problem.predict_zero_loss**0.5
    torch.testing.assert_close(samples.targets.flatten(0, 1), targets.float())
    ((inputs, _),) = samples.validation
    assert inputs.shape == (24, 24)


def test_given_rows_that_fill_no_batch_are_refused(tmp_path):
    with pytest.raises(UsageError, match="24 training samples in .* do not fill one batch of 32; lower --batch_size"):
        problem_of(tmp_path, "--inputs", samples_file(tmp_path, layer_rows("regular", 30)), "--sampling", "fixed")


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_inputs_relative_to_predicting_zero(tmp_path, kind):
    rows = layer_rows(kind)
    config, problem = problem_of(tmp_path, "--inputs", moments(tmp_path, kind))
    outputs = rows @ WEIGHT.double().t()
    assert problem.predict_zero_loss == pytest.approx(outputs.square().mean().item(), rel=1e-9)
    model = random_chain(problem)
    loss = population_loss(problem.internal_weight(), model.factors, problem.metric.inputs) * problem.predict_zero_loss
    outside = problem.coordinates.outside(model)
    assert loss == pytest.approx((outside(rows) - outputs).square().mean().item(), rel=1e-9)


@pytest.mark.parametrize("chain", ["monarch", "lowrank_butterfly"])
@pytest.mark.parametrize("digits", ["none", "lost"])
def test_inputs_that_do_not_vary_leave_nothing_beside_a_fitted_bias(tmp_path, chain, digits):
    rows = torch.ones(50, 24, dtype=torch.float64).cumsum(1)
    if digits == "lost":
        rows = rows + 1e-9 * layer_rows("regular", 50)
    path = save_moments(tmp_path / "x.safetensors", rows)
    problem_of(tmp_path, "--inputs", path, "--chain", chain)
    with pytest.raises(UsageError, match="vary too little around their mean.*; leave it out"):
        problem_of(tmp_path, "--inputs", path, "--chain", chain, "--fit_bias")


REFUSED = {
    "a key alone": (["--inputs_key", "layer"], "--inputs_key without --inputs"),
    "a bias alone": (["--fit_bias"], "--fit_bias without --inputs"),
    "two spreads": (["--inputs", "x", "--input_std", "2"], "--input_std 2 together with --inputs"),
    "moments have no rows": (["--inputs", "x", "--sampling", "fixed"], "--sampling fixed needs raw samples"),
    "a metric alone": (["--loss_metric", "model_loss"], "--loss_metric model_loss without --inputs"),
    "no gradients": (["--inputs", "x", "--loss_metric", "model_loss"], "without gradients of the loss of the model"),
    "another key": (["--inputs", "x", "--inputs_key", "attention"], "no inputs for key 'attention'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_do_not_go_together_are_refused(tmp_path, case):
    flags, message = REFUSED[case]
    path = moments(tmp_path)
    with pytest.raises(UsageError, match=message) as raised:
        problem_of(tmp_path, *(str(path) if flag == "x" else flag for flag in flags))
    assert "\n" not in str(raised.value)


def test_inputs_are_described_by_their_hash_and_counts(tmp_path):
    one, other = (problem_of(tmp_path, "--inputs", moments(tmp_path, kind))[1] for kind in ("regular", "steep"))
    described = one.describe()["inputs"]
    assert described["sha256"] != other.describe()["inputs"]["sha256"]
    assert (described["kind"], described["count"], described["held_out_count"]) == ("measured", 120, 120)
    assert any("120 inputs and 120 held out, effective rank" in note for note in one.notes)
    assert problem_of(tmp_path)[1].notes[0].startswith("Using isotropic random inputs")


def test_sampling_is_whitened_where_the_samples_suffice():
    assert choose_sampling("auto", 10, 10)[0] == "whitened"
    assert choose_sampling("auto", 9, 10)[0] == "fresh"
    assert choose_sampling("fixed", 9, 10)[0] == "fixed"
    with pytest.raises(UsageError, match="needs at least 10 training samples"):
        choose_sampling("whitened", 9, 10)
