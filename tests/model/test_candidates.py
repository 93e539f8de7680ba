"""Floors of many layers: those of one layer, kept in a file, in any family, under isotropic and measured inputs."""

import dataclasses
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refusal
from measured import measured_moments, random_moment

from ks.bounds.floors import loss_floor
from ks.bounds.floors_file import FloorsFile
from ks.bounds.layer_floors import layer_floors
from ks.chain.patterns import make_chain
from ks.model.candidates import check_inputs, find_candidates
from ks.model.layer_weights import select_weights
from ks.moments.metric import LossMetric
from ks.moments.second_moment import UNIT_MOMENT, SecondMoment

FAMILIES = ("monarch", "lowrank", "butterfly")


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{index}.weight": torch.randn(24, 16, generator=generator) for index in range(3)}


@pytest.fixture
def moments(weights):
    return measured_moments(weights, without_gradients=weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("measured", [False, True])
def test_floors_are_those_of_loss_floor(family, measured):
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    inputs = SecondMoment(random_moment("regular", 16)) if measured else UNIT_MOMENT
    chain = make_chain(24, 16, family)
    floors = layer_floors(weight, chain, inputs)
    assert floors.upper[0] == floors.lower[0] == 1
    assert (np.diff(floors.upper) <= 1e-12).all()
    assert chain.parameters(len(floors.upper) - 1) < 24 * 16
    for floor in loss_floor(weight, chain, list(map(int, floors.ranks)), inputs):
        predict_zero = inputs.output_energy(weight) / 24
        assert floors.lower[floor.rank] <= floor.lower / predict_zero + 1e-12
        if not floors.is_interpolated(floor.rank):
            assert floors.upper[floor.rank] == pytest.approx(floor.upper / predict_zero, rel=0.02)
        if floor.exact and family != "butterfly":
            assert floors.upper[floor.rank] == pytest.approx(floor.lower / predict_zero, rel=1e-6, abs=1e-12)


def test_between_known_ranks_the_loss_is_interpolated():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    floors = layer_floors(weight, make_chain(64, 64, blocks=2), random_moment("regular", 64))
    assert 0 < len(floors.known) <= 9 < len(floors.upper)
    between = next(rank for rank in floors.ranks if floors.is_interpolated(rank))
    assert floors.upper[between - 1] > floors.upper[between] > floors.upper[between + 1]


@pytest.mark.parametrize("measured", [False, True])
def test_a_file_keeps_the_floors(weights, moments, tmp_path, measured):
    selected, reports = select_weights(weights).weights, []
    inputs = moments if measured else None
    find = partial(find_candidates, selected, make_chain, moments=inputs, floors_path=tmp_path / "floors.npz")
    first = find(FAMILIES[:2], report=reports.append)
    assert [entry.dense.layer for entry in first] == list(weights)
    assert all(report.endswith(" s") for report in reports)

    reports.clear()
    again = find(FAMILIES[:2], report=reports.append)
    assert reports == ["floors of 3 layers were computed before"]
    for old, new in zip(first, again):
        assert old.dense == new.dense
        for known, read in zip(old.floors, new.floors):
            assert (known.chain, known.energy) == (read.chain, read.energy)
            assert np.array_equal(known.upper, read.upper)
    more = find(FAMILIES, report=reports.append)
    assert [floors.chain.family for floors in more[0].floors] == list(FAMILIES)


@pytest.fixture
def lowrank(weights, tmp_path):
    """Compute the floors of one layer with a file, and return how that file answers for these floors."""
    selected, path = select_weights(weights, "layer.0").weights, tmp_path / "floors.npz"

    def find(**changes):
        [entry] = find_candidates(selected, make_chain, ["lowrank"], None, path)
        key = {"weight_sha256": entry.dense.weight_sha256, "metric_sha256": None, "chain": entry.floors[0].chain}
        return FloorsFile(path).find(**(key | changes))

    return find


def test_other_inputs_values_and_chains_have_other_floors(lowrank):
    assert lowrank() is not None
    for change in ({"metric_sha256": "other"}, {"weight_sha256": "other"}, {"chain": make_chain(24, 16)}):
        assert lowrank(**change) is None


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
def test_a_damaged_file_counts_as_empty(lowrank, tmp_path, content):
    (tmp_path / "floors.npz").write_bytes(content)
    assert lowrank() is not None


def test_invalid_floors_are_computed_again(lowrank, tmp_path):
    path, expected = tmp_path / "floors.npz", lowrank().lower
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = next(name for name in arrays if name.endswith("lower"))
    for broken in (expected[:-1], -expected, expected * np.nan, expected.astype(np.float32)):
        np.savez(path, **(arrays | {name: broken}))
        assert np.array_equal(lowrank().lower, expected)


@pytest.mark.parametrize("stored", [False, True])
def test_tied_weights_count_once_and_copies_twice(weights, tmp_path, stored):
    reports = []
    weights |= {"tied.weight": weights["layer.1.weight"], "copy.weight": weights["layer.1.weight"].clone()}
    torch.save(weights, tmp_path / "model.pth")
    selected = select_weights(tmp_path / "model.pth" if stored else weights).weights
    found = find_candidates(selected, make_chain, ["lowrank"], report=reports.append)
    ties = {"layer.0.weight": (), "layer.1.weight": ("tied.weight",), "layer.2.weight": (), "copy.weight": ()}
    assert {entry.dense.layer: entry.dense.shared_with for entry in found} == ties
    assert "tied.weight: tied to layer.1.weight; planned once, for the inputs of layer.1.weight" in reports


def test_a_file_that_takes_long_to_write_is_not_written_after_every_layer(tmp_path, monkeypatch):
    weights = {f"layer.{index}.weight": torch.eye(24, 16) + index for index in range(12)}
    write, writes, reports = np.savez_compressed, [], []

    def counted(*arguments, **named):
        writes.append(len(named))
        write(*arguments, **named)

    def interrupt(text):
        if text.startswith("8 of 12"):
            raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", counted)
    monkeypatch.setattr(time, "monotonic", lambda: float(len(writes)))  # only writing takes time
    find = partial(find_candidates, select_weights(weights).weights, make_chain, ["lowrank"])
    with pytest.raises(KeyboardInterrupt):
        find(floors_path=tmp_path / "floors.npz", report=interrupt)
    assert len(writes) == 2  # after the first layer, and at the end
    find(floors_path=tmp_path / "floors.npz", report=reports.append)
    assert reports[-1] == "floors of 8 layers were computed before"


def test_layers_without_inputs_are_counted(weights, moments):
    weights |= {"block.7.weight": weights["layer.0.weight"] + 1, "block.8.weight": weights["layer.0.weight"] + 2}
    with refusal(r"no inputs for key 'block.7.weight'.*\(2 layers lack them\); collect them"):
        check_inputs(select_weights(weights).weights, moments, LossMetric.OUTPUT_ENERGY)


def test_floors_in_both_metrics_are_kept_beside_each_other(weights, tmp_path):
    selected, reports = select_weights(weights).weights, []
    known = "floors of 3 layers were computed before"

    def find(moments, loss_metric):
        """Return the plan of a layer, and whether all floors were known."""
        reports.clear()
        options = {"floors_path": tmp_path / "floors.npz", "report": reports.append, "loss_metric": loss_metric}
        entry = find_candidates(selected, make_chain, ["lowrank"], moments, **options)[0]
        return entry.plan(entry.floors[0], 1), known in reports

    moments = measured_moments(weights)
    for loss_metric in LossMetric:
        plan, were_known = find(moments, loss_metric)
        assert not were_known
        assert find(moments, loss_metric) == (plan, True)
    other = dataclasses.replace(moments, gradients=measured_moments(weights, seed=1).gradients)
    assert not find(other, LossMetric.MODEL_LOSS)[1]


def test_moments_with_gradients_of_some_layers_or_of_another_model_are_refused(weights):
    selected, names = select_weights(weights).weights, [*weights]
    with refusal(r"no gradients .* for layer.0.weight, layer.2.weight; collect them"):
        check_inputs(selected, measured_moments(weights, (names[0], names[2])), LossMetric.MODEL_LOSS)
    some = measured_moments(weights, names[:1])
    check_inputs(selected, some, LossMetric.OUTPUT_ENERGY)
    [entry, *_] = find_candidates(selected, make_chain, ["lowrank"], some)
    assert entry.plan(entry.floors[0], 1).loss_increase is None
    other = measured_moments({name: torch.zeros(20, 16) for name in weights})
    with refusal("gradients of 20 outputs for layer.0.weight, which has 24; give the moments"):
        check_inputs(selected, other, LossMetric.OUTPUT_ENERGY)
    transposed = {name: weight.mT for name, weight in weights.items()}
    check_inputs(select_weights(transposed, transpose=True).weights, measured_moments(weights), LossMetric.MODEL_LOSS)


def test_a_family_without_floors_is_refused_and_a_stop_ends_the_work(weights, moments):
    def stop():
        raise KeyboardInterrupt

    selected = select_weights(weights).weights
    with refusal("no floor"):
        find_candidates(selected, make_chain, ["lowrank_butterfly"])
    with pytest.raises(KeyboardInterrupt):
        find_candidates(selected, make_chain, ["monarch"], moments, check_stop=stop)


def test_a_layer_with_nothing_to_learn_is_left_out_with_the_reason(weights):
    first, second, third = weights
    weights[first].zero_()
    weights[second][0, 0] = float("nan")
    lines = []
    (found,) = find_candidates(select_weights(weights).weights, make_chain, ["lowrank"], report=lines.append)
    assert found.dense.layer == third
    assert [line.split(":")[0] for line in lines[:2]] == ["left out"] * 2
    with refusal("is all zero"):
        find_candidates(select_weights(weights, first).weights, make_chain, ["lowrank"])


def test_an_increase_is_per_token_of_the_layer_that_sees_most(weights):
    moments = measured_moments(weights)
    [first, *_], options = weights, (make_chain, ["lowrank"])
    sums = moments.gradients[first]
    fewer = dataclasses.replace(
        sums, sum_xx=sums.sum_xx / 4, sum_x=sums.sum_x / 4, count=sums.count // 4
    )  # the same G from a quarter
    thinned = dataclasses.replace(moments, gradients=moments.gradients | {first: fewer})
    selected = select_weights(weights).weights
    whole, quarter = (
        find_candidates(selected, *options, each, loss_metric=LossMetric.MODEL_LOSS)[0] for each in (moments, thinned)
    )
    increases = [entry.plan(entry.floors[0], 2).loss_increase for entry in (whole, quarter)]
    assert increases[1] == pytest.approx(increases[0] / 4, rel=1e-6)
    np.testing.assert_allclose(quarter.losses(quarter.floors[0]), whole.losses(whole.floors[0]) / 4, rtol=1e-6)
