"""The plan of a model: its totals, its file, and what is refused."""

import dataclasses
import json

import pytest

from ks.chain.patterns import make_chain
from ks.errors import UsageError
from ks.files import columns
from ks.model.model_plan import LayerPlan, ModelPlan


def layer(name, family="lowrank", rank=2, loss=0.25, rows=8, cols=12, **more):
    chain = make_chain(rows, cols, family) if family else None
    return LayerPlan(name, rows, cols, "0" * 64, chain, rank if chain else None, loss, loss / 2, **more)


def plan(**more):
    layers = (
        layer("a.weight", itemsize=2, interpolated=True, inputs_sha256="1" * 64),
        layer("b.weight", "monarch", 1, 0.5, shared_with=("c.weight",)),
        layer("d.weight", None, loss=0.0),
    )
    uniform = tuple(dataclasses.replace(each, relative_loss=0.75) for each in layers)
    return ModelPlan(layers, "budget", 0.7, 0.01, uniform, 1, "model.safetensors", **more)


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
    with pytest.raises(UsageError, match="no uniform"):
        made.as_uniform().as_uniform()
    assert [list(row) for row in made.rows()] == [columns.names(columns.PLAN)] * 3
    assert [row["rank"] for row in made.rows()] == [2, 1, None]
    assert made.rows()[1]["shared_with"] == "c.weight"


def test_a_saved_plan_is_read_back(tmp_path):
    path = tmp_path / "x_plan.json"
    plan().save(path)
    assert ModelPlan.load(path) == plan()
    content = json.loads(path.read_text())
    assert content["parameters"] == 216
    assert content["layers"][1]["parameters"] == 80
    assert content["layers"][0]["share"] == 40 / 96
    assert [*tmp_path.iterdir()] == [path]


def test_a_plan_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "x_plan.json"
    plan().save(path)
    earlier = {"weighting": "energy", "weights": [1.0, 2.0, 1.0], "exact": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | earlier))
    assert ModelPlan.load(path) == plan()


DAMAGE = {
    "no plan": (lambda content: content.clear(), "version"),
    "newer": (lambda content: content.update(version=2), "newest known"),
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
    with pytest.raises(UsageError, match=message) as caught:
        ModelPlan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
