"""Runs and sweeps on measured inputs; the losses in their files are checked against losses computed here."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import QUICK, files_of, interrupt_in_epoch, save_moments

import ks
import rank_sweep_study
import train_with_random
from ks.files.curves import read_curves

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


@pytest.mark.parametrize("fit_bias", [(), ("--fit_bias",)], ids=str)
@pytest.mark.parametrize("kind", ["many", "fewer than features"])
def test_no_run_ends_below_its_floor(tmp_path, weight_path, rows, kind, fit_bias):
    count = 96 if kind == "many" else 10
    path = save_moments(tmp_path / "m.safetensors", rows[:count], rows[count:])
    flags = ("--inputs", path, "--num_epochs", 30, "--num_samples", 400, *fit_bias)
    sweep(weight_path, tmp_path / "out", *flags)
    for row in json.loads((tmp_path / "out" / "rank_sweep_summary.json").read_text()):
        assert row["status"] == "ok"
        assert row["population_loss"] >= row["loss_floor"] * (1 - 1e-9)
        final = files_of(tmp_path / "out", row["rank"]).final
        assert row["population_loss"] == pytest.approx(loss_on(weight_path, final, rows[:count]), rel=1e-3, abs=1e-6)


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path, weight_path, samples, monkeypatch):
    flags = ("--inputs", samples, "--sampling", "fixed", "--fit_bias")
    whole = train(weight_path, tmp_path / "whole", *flags)
    with monkeypatch.context() as patched:
        interrupt_in_epoch(patched, 3)
        train(weight_path, tmp_path / "out", *flags, code=130)
    shutil.copy(samples, tmp_path / "moved.npy")
    resumed = train(weight_path, tmp_path / "out", "--resume", *flags, "--inputs", tmp_path / "moved.npy")
    for name in ("final", "best"):
        one, other = (ks.load(tmp_path / folder / f"ks_chain_{name}.pth") for folder in ("whole", "out"))
        assert all(torch.equal(mine, its) for mine, its in zip(one.parameters(), other.parameters(), strict=True))
    for name in ("train_loss", "val_loss"):
        assert [row[name] for row in resumed] == [row[name] for row in whole]


BEFORE = {
    "other inputs": (("--inputs", "x.npy", "--fit_bias"), "inputs was sha256 "),
    "isotropic": ((), "inputs was isotropic, now sha256 "),
    "no bias": (("--inputs", "x.npy"), "fit_bias was False, now True"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_resuming_with_other_inputs_is_refused(tmp_path, weight_path, samples, rows, case, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, message = BEFORE[case]
    train(weight_path, tmp_path / "out", *flags)
    if case == "other inputs":
        np.save(samples, rows.numpy() + 1)
    capsys.readouterr()
    train(weight_path, tmp_path / "out", "--inputs", samples, "--fit_bias", "--resume", code=2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", [train_with_random, rank_sweep_study])
@pytest.mark.parametrize("is_link", [False, True], ids=["itself", "a link to it"])
def test_inputs_with_the_name_of_a_result_are_never_replaced(tmp_path, weight_path, rows, script, is_link, capsys):
    """Even if it was a result, which --overwrite would delete."""
    alone = script is train_with_random
    place = tmp_path / "out" / ("ks_chain_final.pth" if alone else "rank_2/rank_2_final.pth")
    flags = ["--output_dir", tmp_path / "out", "--quiet", *QUICK, *(["--rank", 2] if alone else ["--ranks", 2])]
    command = [*map(str, ["--weight_path", weight_path, *flags, *([] if alone else ["--overwrite"])])]
    assert script.main(command) == 0
    place.unlink()
    path = tmp_path / "x.pth" if is_link else place
    torch.save(rows, path)
    if is_link:
        place.symlink_to(path)
    content = path.read_bytes()
    capsys.readouterr()
    assert script.main([*command, "--inputs", str(path)]) == 2
    assert str(place) in capsys.readouterr().err
    assert path.read_bytes() == content
