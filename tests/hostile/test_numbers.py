"""Weights and losses at the ends of what numbers hold: trained with finite, non-zero results, or refused."""

import json

import pytest
import torch
from folders import call, refused, train

import ks
import rank_sweep_study
import train_with_random
from ks.files.layout import RunFiles


def save_scaled(path, factor: float) -> torch.Tensor:
    """Save a float64 weight whose entries have this size."""
    weight = factor * torch.randn(16, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.save(weight, path)
    return weight


@pytest.mark.parametrize("init", ["random", "hierarchical"])
@pytest.mark.parametrize("factor", [1e-100, 1e-40, 1e40, 1e100])
def test_a_weight_of_any_size_that_squares_in_double_is_trained(tmp_path, factor, init):
    weight = save_scaled(tmp_path / "w.pth", factor)
    assert train(tmp_path / "w.pth", tmp_path / "out", "--init", init) == 0
    files = RunFiles(tmp_path / "out", "ks_chain", 2)
    for path in (files.final, files.best):
        dense = ks.load(path).to_dense().double()
        assert torch.isfinite(dense).all()
        assert dense.abs().max() > 1e-3 * factor
        assert ((weight - dense) / factor).square().mean() < 1.5
        assert all(torch.isfinite(values).all() for values in ks.load(path).factors)
    curves = json.loads(files.curves_json.read_text())
    losses = [*curves["train_losses"], *curves["val_losses"], curves["population_losses"][-1]]
    assert all(1e-3 < loss / factor**2 < 1e3 for loss in losses)


def test_the_relative_loss_does_not_depend_on_the_size(tmp_path):
    losses = []
    for factor in (1e-80, 1.0, 1e80):
        weight = save_scaled(tmp_path / "w.pth", factor)
        assert train(tmp_path / "w.pth", tmp_path / f"out{factor}") == 0
        curves = json.loads(RunFiles(tmp_path / f"out{factor}", "ks_chain", 2).curves_json.read_text())
        losses.append(curves["val_losses"][-1] / (weight.square().sum().item() / 16))
    assert losses == pytest.approx([losses[1]] * 3, rel=1e-4)


@pytest.mark.parametrize("factor", [1e-300, 1e-150, 1e150, 1e300])
def test_a_weight_whose_loss_leaves_double_is_refused(tmp_path, capsys, factor):
    save_scaled(tmp_path / "w.pth", factor)
    line = refused(
        rank_sweep_study.main, ["--weight_path", tmp_path / "w.pth", "--output_dir", tmp_path / "out"], capsys, tmp_path
    )
    assert "the zero predictor has a loss of" in line
    assert "1e-280 to 1e280 is allowed; scale the weight or the inputs" in line


@pytest.mark.parametrize(("factor", "std"), [(1e-100, "1e-100"), (1e100, "1e100"), (1.0, "1e-100"), (1.0, "1e100")])
def test_weight_and_inputs_are_judged_together(tmp_path, capsys, factor, std):
    save_scaled(tmp_path / "w.pth", factor)
    arguments = ["--weight_path", tmp_path / "w.pth", "--output_dir", tmp_path / "out", "--input_std", std]
    if factor == 1.0:
        assert train(tmp_path / "w.pth", tmp_path / "out", "--input_std", std) == 0
    else:
        assert "scale the weight or the inputs" in refused(train_with_random.main, arguments, capsys, tmp_path)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_sweep_of_a_tiny_weight_has_a_summary_and_figures(tmp_path):
    """Losses of 1e-250: every ratio in the summary is one of finite numbers."""
    save_scaled(tmp_path / "w.pth", 1e-125)
    arguments = ["--weight_path", tmp_path / "w.pth", "--output_dir", tmp_path / "out", "--ranks", 2, "--log_scale"]
    arguments += ["--num_samples", 80, "--batch_size", 16, "--num_epochs", 2, "--device", "cpu"]
    assert call(rank_sweep_study.main, *arguments) == 0
    (row,) = json.loads((tmp_path / "out" / "rank_sweep_summary.json").read_text())
    assert row["status"] == "ok"
    assert 0 < row["relative_loss"] < 2
    assert (tmp_path / "out" / "rank_sweep_floor.png").stat().st_size > 0


FLAGS = {
    "--lr": ("0", "-1", "nan", "inf", "1e300", "1e-300", "ten"),
    "--input_std": ("1e300", "1e-300"),
    "--weight_decay": ("-1",),
    "--gamma": ("0",),
    "--max_grad_norm": ("-1",),
    "--val_split": ("0", "1", "1e-400"),
    "--scheduler_factor": ("0", "1"),
    "--num_epochs": ("0", "2147483648", "1e2"),
    "--seed": ("-1", "9223372036854775808"),
}


@pytest.mark.parametrize(("flag", "text"), [(flag, text) for flag, texts in FLAGS.items() for text in texts])
def test_a_number_outside_its_range_is_refused_with_the_range(weight_path, tmp_path, capsys, flag, text):
    arguments = ["--weight_path", weight_path, "--output_dir", tmp_path / "out", f"{flag}={text}"]
    line = refused(train_with_random.main, arguments, capsys, tmp_path)
    assert f"argument {flag}:" in line
    assert "number" in line
    assert len(line) < 300
