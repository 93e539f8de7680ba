"""Trainings and sweeps on measured inputs, as their users run them; files are checked against losses made by hand."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import QUICK, files_of, interrupt_in_epoch, read_table, save_moments

import ks
import rank_sweep_study
import train_with_random
from ks.files.curves import read_curves
from ks.moments.moments_file import InputMoments
from ks.moments.second_moment import InputSums

pytestmark = pytest.mark.usefixtures("blank_pictures")
ROWS = 120


@pytest.fixture
def rows():
    """Inputs with a mean, most of whose energy is in few directions; the last fifth is held out."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(24, 24, generator=generator) * torch.logspace(0, -2, 24)[:, None]
    return (torch.randn(ROWS, 24, generator=generator) + 1) @ mixing


@pytest.fixture
def samples(tmp_path, rows):
    np.save(tmp_path / "x.npy", rows.numpy())
    return tmp_path / "x.npy"


@pytest.fixture
def moments(tmp_path, rows):
    return save_moments(tmp_path / "x.safetensors", rows[:96], rows[96:])


def train(weight_path, folder, *flags, code=0):
    arguments = ["--weight_path", weight_path, "--output_dir", folder, "--quiet", *QUICK, "--rank", 2, *flags]
    assert train_with_random.main([str(argument) for argument in arguments]) == code
    if code == 0:
        return read_curves(folder / "ks_chain_rank_2_loss_curves.csv")


def sweep(weight_path, folder, *flags):
    arguments = ["--weight_path", weight_path, "--output_dir", folder, "--quiet", *QUICK, "--ranks", 2, 4, *flags]
    assert rank_sweep_study.main([str(argument) for argument in arguments]) == 0


def loss_on(weight_path, chain, rows):
    """The mean squared error of a saved chain on raw inputs."""
    chain, rows = ks.load(chain).double(), rows.double()
    features_first = chain.batch_last
    outputs = chain(rows.t()).t() if features_first else chain(rows)
    return (outputs - rows @ torch.load(weight_path).double().t()).square().mean().item()


FLAGS = {
    "default": (),
    "bias": ("--fit_bias",),
    "features first": ("--bs_last", "--fit_bias"),
    "lowrank": ("--chain", "lowrank"),
    "butterfly": ("--chain", "butterfly", "--init", "hierarchical"),
    "lowrank_butterfly": ("--chain", "lowrank_butterfly", "--fit_bias"),
    "bfloat16": ("--dtype", "bfloat16"),
}


@pytest.mark.parametrize("case", FLAGS)
@pytest.mark.parametrize("form", ["samples", "moments"])
def test_curves_hold_the_losses_of_the_saved_chain_on_raw_inputs(request, tmp_path, weight_path, rows, form, case):
    last = train(weight_path, tmp_path / "out", "--inputs", request.getfixturevalue(form), *FLAGS[case])[-1]
    final = tmp_path / "out" / "ks_chain_final.pth"
    assert (ks.load(final).bias is not None) is ("--fit_bias" in FLAGS[case])
    digits = 0.02 if case == "bfloat16" else 1e-4
    assert last["val_loss"] == pytest.approx(loss_on(weight_path, final, rows[96:]), rel=digits)
    assert last["population_loss"] == pytest.approx(loss_on(weight_path, final, rows[:96]), rel=1e-4)


def test_the_last_line_has_the_relative_loss_on_held_out_inputs(tmp_path, weight_path, rows, capsys):
    path = save_moments(tmp_path / "x.safetensors", rows[:96], 3 * rows[96:])
    train(weight_path, tmp_path / "out", "--inputs", path)
    outputs = 3 * rows[96:] @ torch.load(weight_path).t()
    lost = loss_on(weight_path, tmp_path / "out" / "ks_chain_final.pth", 3 * rows[96:]) / outputs.square().mean().item()
    assert f", {lost:.2%} on held-out inputs; " in capsys.readouterr().out


def test_fixed_sampling_trains_on_the_given_rows(tmp_path, weight_path, samples, rows):
    """With a batch of all of them and no progress, the training loss is theirs."""
    flags = ("--sampling", "fixed", "--batch_size", 96, "--optimizer", "sgd", "--lr", "1e-30")
    row = train(weight_path, tmp_path / "out", "--inputs", samples, *flags)[0]
    outputs = rows[:96] @ torch.load(weight_path).t()
    assert row["train_loss"] == pytest.approx(outputs.square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("fit_bias", [(), ("--fit_bias",)], ids=str)
@pytest.mark.parametrize("kind", ["many", "fewer than features"])
def test_no_training_goes_below_its_floor(tmp_path, weight_path, rows, kind, fit_bias):
    count = 96 if kind == "many" else 10
    path = save_moments(tmp_path / "m.safetensors", rows[:count], rows[count:])
    flags = ("--inputs", path, "--num_epochs", 30, "--num_samples", 400, *fit_bias)
    sweep(weight_path, tmp_path / "out", *flags)
    for row in json.loads((tmp_path / "out" / "rank_sweep_summary.json").read_text()):
        assert row["status"] == "ok"
        assert row["population_loss"] >= row["loss_floor"] * (1 - 1e-9)
        final = files_of(tmp_path / "out", row["rank"]).final
        assert row["population_loss"] == pytest.approx(loss_on(weight_path, final, rows[:count]), rel=1e-3, abs=1e-6)


def test_a_fitted_bias_lowers_losses_and_floors(tmp_path, weight_path, moments):
    summaries = {}
    for name, flags in (("plain", ()), ("bias", ("--fit_bias",))):
        sweep(weight_path, tmp_path / name, "--inputs", moments, "--num_epochs", 20, *flags)
        summaries[name] = json.loads((tmp_path / name / "rank_sweep_summary.json").read_text())
    plain, bias = (summaries[name][0] for name in ("plain", "bias"))  # rank 4 is exact
    assert 0 < bias["loss_floor"] < plain["loss_floor"]
    assert bias["population_loss"] < plain["population_loss"]


def test_isotropic_inputs_from_a_file_make_the_study_without_one(tmp_path, weight_path):
    sums = InputSums(48 * 4.0 * torch.eye(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64), 48)
    path = tmp_path / "white.safetensors"
    InputMoments({"layer": sums}, {}, {"layer.weight": "layer"}, {"layer": 1}).save(path)
    sweep(weight_path, tmp_path / "given", "--inputs", path, "--num_epochs", 10)
    sweep(weight_path, tmp_path / "isotropic", "--input_std", 2, "--num_epochs", 10)
    given, isotropic = (
        json.loads((tmp_path / name / "rank_sweep_summary.json").read_text()) for name in ("given", "isotropic")
    )
    for one, other in zip(given, isotropic, strict=True):
        assert one["loss_floor"] == pytest.approx(other["loss_floor"], rel=1e-9)
        assert one["verdict"] == other["verdict"]
        for name in ("population_loss", "final_val_loss", "final_train_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-12)


def test_a_resumed_training_has_the_bits_of_one_that_was_not_stopped(tmp_path, weight_path, samples, monkeypatch):
    flags = ("--inputs", samples, "--sampling", "fixed", "--fit_bias")
    train(weight_path, tmp_path / "whole", *flags)

    with monkeypatch.context() as patched:
        interrupt_in_epoch(patched, 3)
        train(weight_path, tmp_path / "out", *flags, code=130)
    assert (tmp_path / "out" / "ks_chain_resume.pth").exists()
    shutil.copy(samples, tmp_path / "moved.npy")
    train(weight_path, tmp_path / "out", "--resume", *flags, "--inputs", tmp_path / "moved.npy")
    for name in ("final", "best"):
        one, other = (ks.load(tmp_path / folder / f"ks_chain_{name}.pth") for folder in ("whole", "out"))
        assert all(torch.equal(mine, its) for mine, its in zip(one.parameters(), other.parameters(), strict=True))
    whole, resumed = (
        [
            (row["train_loss"], row["val_loss"])
            for row in read_curves(tmp_path / name / "ks_chain_rank_2_loss_curves.csv")
        ]
        for name in ("whole", "out")
    )
    assert whole == resumed


@pytest.mark.parametrize("before", ["other inputs", "isotropic", "no bias"])
def test_resuming_with_other_inputs_is_refused_and_named(tmp_path, weight_path, samples, rows, before, capsys):
    first = {"other inputs": ("--inputs", samples, "--fit_bias"), "isotropic": ("--fit_bias",)}
    if before == "isotropic":
        train(weight_path, tmp_path / "out")
    else:
        train(weight_path, tmp_path / "out", *first.get(before, ("--inputs", samples)))
    if before == "other inputs":
        np.save(samples, rows.numpy() + 1)
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    train(weight_path, tmp_path / "out", "--inputs", samples, "--fit_bias", "--resume", code=2)
    (line,) = capsys.readouterr().err.splitlines()
    named = {"other inputs": "inputs was sha256 ", "isotropic": "inputs was isotropic, now sha256 "}
    assert named.get(before, "fit_bias was False, now True") in line
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept


@pytest.mark.parametrize("sampling", ["auto", "fixed"])
def test_one_job_and_two_give_the_same_bits(tmp_path, weight_path, samples, sampling):
    for jobs in (1, 2):
        flags = ("--inputs", samples, "--fit_bias", "--sampling", sampling, "--jobs", jobs, "--device", "cpu")
        sweep(weight_path, tmp_path / f"jobs_{jobs}", *flags)
    for rank in (2, 4):
        one, two = (files_of(tmp_path / f"jobs_{jobs}", rank) for jobs in (1, 2))
        assert "drawn here" not in one.log.read_text() + two.log.read_text()
        assert all(
            torch.equal(mine, its)
            for mine, its in zip(ks.load(one.final).parameters(), ks.load(two.final).parameters(), strict=True)
        )
        losses = [
            [(row["train_loss"], row["val_loss"]) for row in read_table(files.curves_csv)] for files in (one, two)
        ]
        assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["inputs.npy", "ks_chain_rank_2_loss_curves.npy"])
def test_inputs_in_the_results_folder_stay_as_they_are(tmp_path, weight_path, samples, name):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / name
    shutil.copy(samples, path)
    for flags in ((), ("--resume",), ()):
        train(weight_path, tmp_path / "out", "--inputs", path, *flags)
        assert path.read_bytes() == samples.read_bytes()


@pytest.mark.parametrize("link", ["itself", "symbolic", "hard", "earlier result"])
@pytest.mark.parametrize("script", ["trainer", "sweep"])
def test_inputs_with_the_name_of_a_result_are_never_replaced(tmp_path, weight_path, rows, script, link, capsys):
    names = {"trainer": "out/ks_chain_final.pth", "sweep": "out/rank_2/rank_2_final.pth"}
    place = tmp_path / names[script]
    main = train_with_random.main if script == "trainer" else rank_sweep_study.main
    ranks = ["--rank", "2"] if script == "trainer" else ["--ranks", "2", "4", "--overwrite"]
    common = ["--weight_path", weight_path, "--output_dir", tmp_path / "out", "--quiet", *QUICK, *ranks]
    if link == "earlier result":
        assert main([*map(str, common)]) == 0
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place if link in ("itself", "earlier result") else tmp_path / "x.pth"
    torch.save(rows, path)
    if link == "symbolic":
        place.symlink_to(path)
    if link == "hard":
        os.link(path, place)
    content = path.read_bytes()
    capsys.readouterr()
    assert main([*map(str, common), "--inputs", str(path)]) == 2
    assert str(place) in capsys.readouterr().err
    assert path.read_bytes() == content
