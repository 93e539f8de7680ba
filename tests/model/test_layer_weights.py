"""Weights by globs, from files, shards, models and mappings; everything else is skipped with a note."""

import json

import pytest
import safetensors.torch
import torch
from conftest import refusal
from networks import Conv1D

from ks.model.layer_weights import select_weights


@pytest.fixture
def tensors():
    shapes = {
        "embeddings.word.weight": (20, 8),
        "layer.0.dense.weight": (6, 8),
        "layer.0.dense.bias": (6,),
        "layer.0.conv.weight": (4, 4, 3),
        "layer.1.dense.weight": (6, 8),
        "layer.1.norm.weight": (8,),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def names(selection):
    return [weight.name for weight in selection.weights]


DENSE = ["layer.0.dense.weight", "layer.1.dense.weight"]


def test_globs_name_the_weights_of_a_file(tensors, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(tensors, path)
    selection = select_weights(path, "layer.*.dense.weight")
    assert names(selection) == DENSE
    assert (selection.source, selection.notes) == (path.name, ())
    assert torch.equal(selection.weights[1].read().tensor, tensors[DENSE[1]])


def test_a_sharded_checkpoint_is_one(tensors, tmp_path):
    file_of = {}
    for number, name in enumerate(tensors):
        file_of[name] = f"model-{number % 2}.safetensors"
    for file in set(file_of.values()):
        safetensors.torch.save_file({name: tensors[name] for name in tensors if file_of[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    selection = select_weights(index, "layer.*.dense.weight")
    assert names(selection) == DENSE
    for weight in selection.weights:
        assert torch.equal(weight.read().tensor, tensors[weight.name])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../other.safetensors"}, "in its folder are needed"),
        ({"a": "model.h5"}, r"\.safetensors or \.bin files in its folder are needed"),
        ({"a": "missing.safetensors"}, "no such file"),
        ({"b": "one.safetensors"}, "which is not in one.safetensors"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, weight_map, message):
    safetensors.torch.save_file({"a": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with refusal(message):
        select_weights(index)


def test_other_tensors_and_embeddings_are_skipped_with_a_note(tensors):
    selection = select_weights(tensors)
    assert names(selection) == DENSE
    assert selection.notes == (
        "skipped embeddings.word.weight: embeddings, by their names (give their full names to plan them)",
        "skipped layer.0.dense.bias, layer.0.conv.weight, layer.1.norm.weight: not 2-D weights",
    )
    assert names(select_weights(tensors, ["embeddings.word.weight"])) == ["embeddings.word.weight"]


def test_a_glob_that_matches_nothing_names_the_nearest(tensors):
    with refusal(r"nothing matches 'layer.\*.dens.weight'; nearest of 6: layer.1.dense.weight"):
        select_weights(tensors, ["layer.0.dense.weight", "layer.*.dens.weight"])
    with refusal("matches no 2-D weight that a chain can replace; skipped layer.0.dense.bias: not"):
        select_weights(tensors, "**.bias")


def test_weights_of_a_model_are_those_of_its_linear_layers():
    model = torch.nn.ModuleDict(
        {"embedding": torch.nn.Embedding(9, 4), "first": torch.nn.Linear(4, 3), "second": Conv1D(5, 3)}
    )
    first, second = select_weights(model).weights
    assert (first.name, second.name) == ("first.weight", "second.weight")
    assert torch.equal(first.read().tensor, model["first"].weight)
    assert torch.equal(second.read().tensor, model["second"].weight.t())


def test_an_offloaded_model_is_planned_by_its_file():
    with refusal("0.weight of the model has no values.*; plan the file of its checkpoint"):
        select_weights(torch.nn.Sequential(torch.nn.Linear(4, 3, device="meta")))


def test_a_mapping_may_be_transposed(tensors):
    [weight] = select_weights(tensors, "layer.0.dense", transpose=True).weights
    assert torch.equal(weight.read().tensor, tensors["layer.0.dense.weight"].t())


def test_the_coverage_counts_parameters_once_and_says_where_the_others_are():
    model = torch.nn.ModuleDict(
        {"table": torch.nn.Embedding(12, 8), "fc": torch.nn.Linear(8, 4), "head": torch.nn.Linear(8, 12, bias=False)}
    )
    model["head"].weight = model["table"].weight
    assert select_weights(model).coverage == "32 of 132 parameters (24.2%); the others: 72.7% Embedding, 3.0% biases"
    state = {"fc.weight": torch.ones(4, 8), "experts": torch.ones(3, 4, 8), "other.weight": torch.ones(2, 2)}
    assert select_weights(state, "fc").coverage == (
        "32 of 132 parameters (24.2%); the others: 72.7% tensors that are not 2-D, 3.0% other 2-D weights"
    )
