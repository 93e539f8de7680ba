"""The plan of a model: its totals, its file, and what is refused."""

import dataclasses
import json

import pytest
from conftest import refusal

from ks.chain.patterns import make_chain
from ks.files import columns
from ks.model.layer_plan import LayerPlan
from ks.model.model_plan import ModelPlan, Objective
from ks.moments.metric import DAMPING, LossMetric


def layer(name, family="lowrank", rank=2, loss=0.25, rows=8, cols=12, **more):
    chain = make_chain(rows, cols, family) if family else None
    return LayerPlan(name, rows, cols, "0" * 64, chain, rank if chain else None, loss, loss / 2, **more)


def plan():
    layers = (
        layer("a.weight", itemsize=2, interpolated=True, inputs_sha256="1" * 64),
        layer("b.weight", "monarch", 1, 0.5, shared_with=("c.weight",)),
        layer("d.weight", None, loss=0.0),
    )
    uniform = tuple(dataclasses.replace(each, relative_loss=0.75) for each in layers)
    return ModelPlan(layers, Objective.BUDGET, 0.7, 0.01, uniform, 1, "model.safetensors", "3 of 9 parameters")


def test_totals_count_chains_dense_layers_and_tied_weights_once():
    made = plan()
    assert [each.family for each in made.layers] == ["lowrank", "monarch", "dense"]
    assert [each.parameters for each in made.layers] == [2 * 20, 8 * 4 + 12 * 4, 96]
    assert made.dense_parameters == 3 * 96
    assert made.parameters == 40 + 80 + 96
    assert made.share == 216 / 288
    assert made.num_bytes == 40 * 2 + 80 * 4 + 96 * 4
    assert made.dense_bytes == 96 * 2 + 96 * 8
    assert made.mean_relative_loss == 0.25
    assert made.mean_relative_loss_lower == 0.125
    assert made.as_uniform().mean_relative_loss == 0.75
    with refusal("no uniform"):
        made.as_uniform().as_uniform()
    assert [list(row) for row in made.rows()] == [columns.names(columns.PLAN)] * 3
    assert [row["rank"] for row in made.rows()] == [2, 1, None]
    assert made.rows()[1]["shared_with"] == "c.weight"


def by_loss(**more):
    """A plan by the loss of the model, which costs 0.5 nats where the same fraction in every layer costs 0.8."""
    layers = (
        layer("a.weight", loss=0.3, loss_increase=0.4, loss_increase_lower=0.3, gradients_sha256="2" * 64),
        layer("b.weight", "monarch", 1, 0.5, loss_increase=0.1, loss_increase_lower=0.1, interpolated=True),
        layer("d.weight", None, loss=0.0, loss_increase=0.0, loss_increase_lower=0.0),
    )
    layers = tuple(dataclasses.replace(each, relative_loss_lower=None) for each in layers)
    uniform = tuple(dataclasses.replace(each, loss_increase=0.8 / 3, relative_loss=0.2) for each in layers)
    made = ModelPlan(layers, Objective.BUDGET, 0.7, 0.01, uniform, loss_metric=LossMetric.MODEL_LOSS, unit="nats")
    return dataclasses.replace(made, **more)


def test_the_increase_of_the_loss_is_a_sum_and_unknown_if_that_of_a_layer_is():
    assert by_loss().loss_increase == pytest.approx(0.5)
    assert by_loss().loss_increase_lower == pytest.approx(0.4)
    assert by_loss().mean_relative_loss_lower is None
    assert by_loss().as_uniform().loss_increase == pytest.approx(0.8)
    assert plan().loss_increase is None
    mixed = (by_loss().layers[0], layer("b.weight"))
    assert by_loss(layers=mixed, uniform=()).loss_increase is None


def test_both_metrics_are_printed_and_a_plan_by_output_energy_begins_with_a_warning():
    first, *others = str(plan()).splitlines()
    assert first.startswith(
        "WARNING: this plan minimises the output energy that the layers lose, which is not the loss"
    )
    assert "loss_" not in others[others.index("") + 1]
    assert plan().sentences()[-1] == "These weights have 3 of 9 parameters."
    text = " ".join(str(by_loss()).split())
    assert text.startswith("The plan keeps 75.00% of the parameters")
    same = "with the same fraction of parameters in every layer (75.00%)."
    assert f"is predicted to increase by 0.5 nats per token (perplexity × 1.649); by 0.8 {same}" in text
    assert f"lose 26.67% of their output energy on average, which the plan does not minimise; 20.00% {same}" in text
    assert "monarch 1 83.3% ~0.1 ~50.00%" in text
    energy = dataclasses.replace(by_loss(), loss_metric=LossMetric.OUTPUT_ENERGY)
    assert "Plan by the loss of the model, whose gradients these moments have" in energy.sentences()[0]


def test_training_and_another_choice_have_limits_of_their_own():
    """They bound different things: chains of these ranks, and the best known chains of other ranks."""
    for made, loss, lower, least in (
        (by_loss(), "the predicted increase", "0.4", "0.495"),
        (plan(), "this average", "12.50%", "24.75%"),
    ):
        training, choice = [sentence for sentence in made.sentences() if "raining" in sentence]
        assert training == f"Training chains of these ranks can lower {loss} to {lower} at best."
        assert choice == f"Without training, no other choice of ranks and families lowers {loss} below {least}."
    optimal = " ".join(by_loss(gap=5e-4).sentences())
    assert "families lowers the predicted increase, to the digits shown: the plan is optimal." in optimal
    exact = tuple(dataclasses.replace(each, loss_increase_lower=each.loss_increase) for each in by_loss().layers)
    text = " ".join(by_loss(layers=exact, objective=Objective.TARGET_LOSS_INCREASE).sentences())
    assert "Training chains" not in text
    assert "every choice of ranks and families that meets the target has at least 214 parameters." in text


def test_a_measured_plan_calibrates_the_prediction_of_another():
    first = by_loss().measured(1.0, uniform=1.6)
    assert first.as_uniform().measured_increase == 1.6
    measured = "Measured: 1 nats per token (perplexity × 2.718), 2.00 times the prediction; 1.6 with the same fraction"
    assert measured in " ".join(first.sentences())
    noise = " ".join(by_loss().measured(-0.25).sentences())
    assert "Measured: -0.25 nats per token" in noise
    assert "no increase beyond the noise of the measurement" in noise
    assert "times the prediction" not in noise
    second = by_loss().measured(4.0)
    made = by_loss().calibrated([first, second, plan().measured(3.0), by_loss()])
    assert made.calibrated_by == 3
    assert made.factor == pytest.approx((2 * 2 * 8) ** (1 / 3))
    assert "By the 3 plans that were measured, this is about 1.59 nats per token" in " ".join(made.sentences())
    with refusal("calibrated by plans with a predicted and a measured increase above 0"):
        by_loss().calibrated([by_loss()])
    with refusal("above 0"):
        by_loss().calibrated([by_loss().measured(-0.1)])


def test_a_plan_that_is_worse_than_the_same_fraction_in_every_layer_is_reported_first():
    wrong = by_loss().measured(1.0, uniform=0.9)
    assert wrong.sentences()[0].startswith("WARNING: this plan is predicted to be better than the same fraction of")
    assert "measured to be worse: 1 against 0.9 per token. Use that one, plan.as_uniform()" in wrong.sentences()[0]
    assert not by_loss().measured(0.9, uniform=1.0).is_misjudged
    level = dataclasses.replace(wrong, uniform=wrong.layers)
    assert not level.is_misjudged


def test_a_saved_plan_is_read_back(tmp_path):
    path = tmp_path / "x_plan.json"
    measured = by_loss().measured(1.0, uniform=0.9).calibrated([by_loss().measured(2.0)])
    for made in (plan(), by_loss(), measured):
        made.save(path)
        assert ModelPlan.load(path) == made
    content = json.loads(path.read_text())
    assert (content["loss_increase"], content["damping"], content["unit"]) == (0.5, DAMPING, "nats")
    plan().save(path)
    content = json.loads(path.read_text())
    assert content["parameters"] == 216
    assert content["layers"][1]["parameters"] == 80
    assert content["layers"][0]["share"] == 40 / 96
    assert [*tmp_path.iterdir()] == [path]


def test_a_plan_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "x_plan.json"
    plan().save(path)
    content = json.loads(path.read_text()) | {"version": 1, "weighting": "energy", "weights": [1.0, 2.0, 1.0]}
    for name in ("loss_metric", "unit", "measured_increase", "measured_uniform", "factor", "calibrated_by"):
        del content[name]
    for entry in content["layers"] + content["uniform"]:
        for name in ("loss_increase", "loss_increase_lower", "gradients_sha256"):
            del entry[name]
    path.write_text(json.dumps(content))
    assert ModelPlan.load(path) == plan()


DAMAGE = {
    "no plan": (lambda content: content.clear(), "version"),
    "newer": (lambda content: content.update(version=3), "newest known"),
    "null": (lambda content: content["layers"][0].update(relative_loss=None), "relative_loss"),
    "no rank": (lambda content: content["layers"][0].update(rank=None), "needs a rank"),
    "shape": (lambda content: content["layers"][0].update(rows=9), "its chain 8 × 12"),
    "splits": (lambda content: content["layers"][0]["chain"].update(row_splits=[3, 1]), "multiply to 3"),
    "twice": (lambda content: content["layers"][0].update(layer="c.weight"), "two entries"),
    "uniform": (lambda content: content["uniform"].pop(), "2 layers of the uniform plan"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line(tmp_path, damage):
    path = tmp_path / "x_plan.json"
    plan().save(path)
    content = json.loads(path.read_text())
    change, message = DAMAGE[damage]
    change(content)
    path.write_text(json.dumps(content))
    with refusal(message) as caught:
        ModelPlan.load(path)
    assert str(path) in str(caught.value)
