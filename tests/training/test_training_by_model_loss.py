"""Training by the loss of the model: what is inside is what the user's metric G ⊗ C says, and what a run reports."""

import itertools
import json

import pytest
import torch
from conftest import QUICK, save_moments
from layer_rows import WEIGHT, layer_rows, problem_of

import ks
import train_with_random
from ks.bounds.rank_floors import RankFloors
from ks.cli.flags import SweepConfig
from ks.errors import UsageError
from ks.files.curves import read_curves
from ks.layer import KSLinear
from ks.model.prediction import per_token
from ks.moments.metric import DAMPING, LossMetric
from ks.training.criterion import loss_and_gradient, mean_squared_error
from ks.training.criterion_identity import Edits
from ks.training.optimizer import Optimizer
from ks.training.run_state import changes, settings_in, settings_of
from ks.training.samples import make_samples
from ks.training.trainable_chain import TrainableChain

ROWS, UNSEEN = layer_rows("regular"), layer_rows("regular", seed=1)
SLOPES, UNSEEN_SLOPES = (0.1 * layer_rows("steep", cols=16, seed=seed) for seed in (5, 6))
MODEL_LOSS = ("--loss_metric", "model_loss")
FAMILIES = ("monarch", "lowrank", "butterfly", "lowrank_butterfly")


def moments(folder, **changes):
    parts = {"held_out": UNSEEN, "gradients": SLOPES, "held_out_gradients": UNSEEN_SLOPES} | changes
    return save_moments(folder / "x.safetensors", ROWS, **parts)


def model_problem(folder, *flags, **changes):
    return problem_of(folder, "--inputs", moments(folder, **changes), *MODEL_LOSS, *flags)


def increase(error, rows, slopes, centre=0.0):
    """½ tr(G E C Eᵀ) by its definition, over all pairs of an input and a gradient."""
    gradients = slopes.t() @ slopes / len(slopes)
    mean = gradients.diagonal().mean() * torch.eye(len(gradients)).double()
    damped = (1 - DAMPING) * gradients + DAMPING * mean
    outputs = (rows - centre) @ error.double().t()
    return 0.5 * ((outputs @ damped) * outputs).sum().item() / len(rows)


@pytest.mark.parametrize("fit_bias", [(), ("--fit_bias",)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_has_the_loss_inside_that_the_metric_gives_it_outside(tmp_path, family, fit_bias):
    _, problem = model_problem(tmp_path, "--chain", family, *fit_bias)
    mean = ROWS.mean(0) if fit_bias else 0.0
    assert problem.predict_zero_loss == pytest.approx(increase(WEIGHT, ROWS, SLOPES), rel=1e-9)
    assert problem.layer_inputs.held_out_predict_zero_loss == pytest.approx(
        increase(WEIGHT, UNSEEN, UNSEEN_SLOPES), rel=1e-9
    )
    torch.manual_seed(0)
    model = KSLinear.from_patterns(problem.chain.patterns(2), dtype=torch.float64)
    error = WEIGHT - problem.coordinates.outside(model).to_dense()
    inside = problem.metric.loss(problem.internal_weight() - model.to_dense()) / 16
    assert inside * problem.predict_zero_loss == pytest.approx(increase(error, ROWS, SLOPES, mean), rel=1e-8)
    held_out = problem.held_out_loss(model) * problem.predict_zero_loss
    assert held_out == pytest.approx(increase(error, UNSEEN, UNSEEN_SLOPES, mean), rel=1e-8)
    energy = ((ROWS - mean) @ error.double().t()).square().sum() / (ROWS @ WEIGHT.double().t()).square().sum()
    assert problem.effects(model) == pytest.approx(
        {
            "loss_increase": increase(error, ROWS, SLOPES, mean),
            "held_out_loss_increase": increase(error, UNSEEN, UNSEEN_SLOPES, mean),
            "energy_loss": energy.item(),
        },
        rel=1e-8,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_row_groups_are_white_inside_and_their_coupling_alone_is_left(tmp_path, family):
    _, problem = model_problem(tmp_path, "--chain", family)
    groups = problem.chain.patterns(1)[0].d
    if groups == 1:
        assert problem.metric.kind is LossMetric.OUTPUT_ENERGY
        return
    inside = problem.metric.rows_in_groups(groups).matrix.view(groups, 16 // groups, groups, 16 // groups)
    for group in range(groups):
        torch.testing.assert_close(inside[group, :, group], torch.eye(16 // groups).double())
    assert inside[0, :, 1].abs().max() > 0.01


def test_gradients_that_couple_no_row_groups_leave_nothing_behind(tmp_path):
    apart = torch.zeros(64, 16, dtype=torch.float64)
    for group in range(4):  # t::4
        apart[16 * group : 16 * (group + 1), group::4] = layer_rows("regular", 16, 4, seed=group)
    _, problem = model_problem(tmp_path, gradients=apart)
    assert problem.metric.kind is LossMetric.OUTPUT_ENERGY
    assert problem.metric.loss(problem.internal_weight()) == pytest.approx(16)


def floors_of(problem):
    return RankFloors(problem.internal_weight(), problem.chain, problem.metric)


LAYOUTS = [(), ("--bs_last",), ("--chain", "lowrank"), ("--chain", "butterfly")]


@pytest.mark.parametrize("flags", LAYOUTS, ids=str)
def test_the_criterion_of_a_batch_is_the_weighted_error_and_its_gradient_that_of_autograd(tmp_path, flags):
    config, problem = model_problem(tmp_path, *flags)
    weight = problem.internal_weight()
    chain = TrainableChain(config, problem, weight)
    for factor in chain.factors:
        factor.normal_(generator=torch.Generator().manual_seed(7))
    samples = make_samples(config, problem, weight, chain.output_rows)
    x, y = samples.first()
    leaves = [factor.double().requires_grad_() for factor in chain.factors]
    inputs = (x.t() if config.bs_last else x).double()
    errors = (weight @ inputs.t()) - ks.chain_product(inputs, leaves).t()
    expected = (errors * (problem.metric.outputs.matrix_of(16) @ errors)).mean()

    def loss_of(x, y):
        return loss_and_gradient(mean_squared_error, chain(x), y, outputs=chain.output_metric)

    loss, gradient = loss_of(x, y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    optimizer = Optimizer("sgd", chain.factors)
    chain.backward(gradient, optimizer)
    for found, exact in zip(optimizer.gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    # A full whitened set has exactly the second moment C, and held-out samples that of the held-out inputs.
    with torch.no_grad():
        mean = torch.stack([loss_of(x, y)[0] for _, x, y in samples.epoch(1)]).mean().item()
        relative = problem.metric.loss(weight - chain.model.double().to_dense()) / 16
        assert mean == pytest.approx(relative, rel=1e-4)
        ((x, y),) = samples.validation
        chain.model.float()
        found = mean_squared_error(chain.predict(x), y).item()
        assert found == pytest.approx(problem.held_out_loss(chain.model), rel=1e-4)


def train(folder, weight_path, *flags, code=0, out="out"):
    flags = ("--latency_seconds", 0, "--quiet", "--rank", 2, *flags)
    arguments = ["--weight_path", weight_path, "--output_dir", folder / out, *flags]
    assert train_with_random.main([str(argument) for argument in arguments]) == code
    if code == 0:
        log = json.loads((folder / out / "ks_chain_training_log.json").read_text())
        return read_curves(folder / out / "ks_chain_rank_2_loss_curves.csv"), log


@pytest.mark.parametrize("trained", ["model_loss", "output_energy"])
@pytest.mark.parametrize("family", ["monarch", "lowrank"])
def test_the_log_has_what_the_final_chain_costs_the_model(tmp_path, weight_path, family, trained, monkeypatch, capsys):
    validate, epochs = train_with_random.validate, itertools.count(1)  # the first epoch shall have the best model
    monkeypatch.setattr(
        train_with_random, "validate", lambda *given: (0.0, {}) if next(epochs) == 1 else validate(*given)
    )
    flags = ("--inputs", moments(tmp_path), "--chain", family, "--loss_metric", trained, *QUICK)
    curves, log = train(tmp_path, weight_path, *flags)
    weight = torch.load(weight_path)
    error = weight.double() - ks.load(tmp_path / "out" / "ks_chain_final.pth").double().to_dense()
    assert log["loss_increase"] == pytest.approx(increase(error, ROWS, SLOPES), rel=1e-9)
    assert log["held_out_loss_increase"] == pytest.approx(increase(error, UNSEEN, UNSEEN_SLOPES), rel=1e-9)
    energy = (ROWS @ error.t()).square().sum() / (ROWS @ weight.double().t()).square().sum()
    assert log["energy_loss"] == pytest.approx(energy.item(), rel=1e-9)
    assert f", predicted to cost the model {per_token(log['loss_increase'], 'nats')}; " in capsys.readouterr().out
    last = curves[-1]
    if trained == "model_loss":
        assert last["population_loss"] == pytest.approx(log["loss_increase"], rel=1e-5)
        assert last["val_loss"] == pytest.approx(log["held_out_loss_increase"], rel=1e-4)
        assert log["relative_loss"] == pytest.approx(log["loss_increase"] / increase(weight, ROWS, SLOPES), rel=1e-5)
    else:
        assert log["relative_loss"] == pytest.approx(log["energy_loss"], rel=1e-5)


def test_without_gradients_the_log_has_no_loss_of_the_model(tmp_path, weight_path):
    _, log = train(tmp_path, weight_path, "--inputs", save_moments(tmp_path / "x.safetensors", ROWS), *QUICK)
    assert not {"loss_increase", "held_out_loss_increase", "energy_loss"} & log.keys()


@pytest.mark.parametrize(("family", "within"), [("lowrank", 1.01), ("monarch", 1.05), ("butterfly", 1.05)])
def test_a_run_ends_near_the_best_known_chain(tmp_path, family, within):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 48, generator=generator)

    def steep(width, seed):
        turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]
        return (torch.randn(2000, width, generator=generator) / torch.arange(1, width + 1.0)) @ turn

    path = save_moments(tmp_path / "x.safetensors", steep(48, 1), gradients=steep(32, 2))
    flags = ("--inputs", path, *MODEL_LOSS, "--chain", family, "--num_samples", 2000, "--num_epochs", 40)
    _, problem = problem_of(tmp_path, *flags, weight=weight)
    _, log = train(tmp_path, tmp_path / "w.pth", *flags)
    assert log["relative_loss"] < within * floors_of(problem).upper(2)


@pytest.mark.parametrize("family", ["monarch", "lowrank", "butterfly"])
def test_a_hierarchical_start_is_the_factorisation_in_the_metric(tmp_path, family):
    config, problem = model_problem(tmp_path, "--chain", family, "--init", "hierarchical", "--rank", 2)
    chain = TrainableChain(config, problem, problem.internal_weight())
    loss = problem.metric.loss(problem.internal_weight() - chain.model.double().to_dense()) / 16
    assert loss == pytest.approx(floors_of(problem).upper(2), rel=1e-4)


def test_gradients_of_another_model_are_refused(tmp_path):
    with pytest.raises(UsageError, match="gradients of 12 outputs: a weight of 16 rows"):
        model_problem(tmp_path, gradients=SLOPES[:, :12])


def test_another_criterion_has_no_loss_of_the_model(tmp_path):
    with pytest.raises(UsageError, match="model_loss needs the criterion mean_squared_error .* is l1_loss; leave"):
        problem_of(tmp_path, "--inputs", moments(tmp_path), *MODEL_LOSS, edits=Edits("l1_loss"))


def test_a_target_in_nats_chooses_the_metric():
    assert SweepConfig(target_loss_increase=1e-3).training_settings()["loss_metric"] == "model_loss"
    with pytest.raises(UsageError, match="together with --target_relative_loss"):
        SweepConfig(target_loss_increase=1e-3, target_relative_loss=0.1)
    with pytest.raises(UsageError, match="together with --loss_metric output_energy"):
        SweepConfig(target_loss_increase=1e-3, loss_metric="output_energy")


def test_gradients_are_part_of_a_study_that_minimises_the_loss_of_the_model_alone(tmp_path):
    path = save_moments(tmp_path / "x.safetensors", ROWS, UNSEEN)
    plain = settings_of(*problem_of(tmp_path, "--inputs", path))
    before = {name: value for name, value in plain.items() if name != "loss_metric"}  # of an earlier version
    assert changes(settings_in(before, None), plain) == ""
    energy = settings_of(*problem_of(tmp_path, "--inputs", moments(tmp_path)))
    assert energy == plain
    ours = settings_of(*model_problem(tmp_path))
    others = settings_of(*model_problem(tmp_path, gradients=UNSEEN_SLOPES))
    assert changes(settings_in(before, None), ours).startswith("loss_metric was output_energy, now model_loss")
    assert changes(ours, energy) == "loss_metric was model_loss, now output_energy"
    assert changes(ours, others).startswith("gradients was sha256 ")
    assert ours["damping"] == DAMPING
