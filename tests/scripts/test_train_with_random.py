"""One run as users start it: a subprocess in another folder, whose files are checked afterwards."""

import json
import re

import pytest
import torch
from conftest import QUICK, dense_loss, floor_of, read_table
from scipy.linalg import hadamard

import ks
import train_with_random
from ks.chain.passes import ChainPasses
from ks.files.curves import read_curves
from ks.files.make_weight import make_weight
from ks.files.weights import load_weight
from ks.training import gauss_newton, recorder


def test_a_run_writes_the_documented_files(run, weight_path, tmp_path):
    done = run("train_with_random.py", "--weight_path", weight_path, *QUICK, "--save_interval", 2, "--log_grad_norm")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "trained_models"
    assert sorted(path.name for path in folder.iterdir()) == [
        "ks_chain_best.pth",
        "ks_chain_config.json",
        "ks_chain_epoch_2.pth",
        "ks_chain_final.pth",
        "ks_chain_rank_4_loss_curves.csv",
        "ks_chain_rank_4_loss_curves.json",
        "ks_chain_resume.pth",
        "ks_chain_training_log.json",
    ]
    text = (folder / "ks_chain_rank_4_loss_curves.csv").read_text()
    assert text.startswith("epoch,train_loss,val_loss,rank,")
    rows = read_table(folder / "ks_chain_rank_4_loss_curves.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    curves = json.loads((folder / "ks_chain_rank_4_loss_curves.json").read_text())
    assert list(curves)[:4] == ["rank", "epochs", "train_losses", "val_losses"]
    assert curves["epochs"] == [1, 2, 3]
    assert len(curves["grad_norms"]) == 3
    assert json.loads((folder / "ks_chain_training_log.json").read_text())["status"] == "ok"
    config = json.loads((folder / "ks_chain_config.json").read_text())
    assert config["problem"]["weight"]["sha256"] == load_weight(weight_path).sha256()
    assert (config["settings"]["criterion"], config["settings"]["metrics"]) == ("mean_squared_error", "none")
    for choice in ("impl", "steps"):
        assert config[choice].keys() == {"name", "reason"}
        assert f"{choice} {config[choice]['name']}: {config[choice]['reason']}" in done.stderr
    for name in ("best", "final", "epoch_2"):
        chain = ks.load(folder / f"ks_chain_{name}.pth")
        assert (chain.out_features, chain.in_features) == (16, 24)
    assert "epoch 3/3" in done.stderr
    last = read_curves(folder / "ks_chain_rank_4_loss_curves.csv")[-1]
    relative = last["population_loss"] / (torch.load(weight_path).square().sum().item() / 16)  # exact, not sampled
    assert done.stdout.startswith(f"rank 4: validation loss {last['val_loss']:.6g}, relative loss {relative:.2%}; ")


@pytest.mark.parametrize("layout", [(), ("--bs_last",)], ids=["batch first", "features first"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("float16", 1e-4), ("bfloat16", 1e-3)])
def test_an_exact_chain_is_learned_in_every_dtype_and_layout(run, tmp_path, dtype, limit, layout):
    weight = make_weight(16, 24, "exact_chain", chain=ks.make_chain(16, 24), rank=2)
    torch.save(weight, tmp_path / "exact.pth")
    arguments = ("--weight_path", "exact.pth", "--rank", 2, "--num_samples", 2000, "--num_epochs", 10, "--dtype", dtype)
    done = run("train_with_random.py", *arguments, *layout, "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    assert dense_loss(weight, ks.load(tmp_path / "out" / "ks_chain_final.pth")) < limit


@pytest.mark.parametrize(
    ("optimizer", "schedule", "lr"),
    [("gauss_newton", "plateau", 1e-3), ("adamw", "cosine", 1e-3), ("adam", "step", 1e-3), ("sgd", "none", 0.5)],
)
def test_every_optimizer_and_every_schedule_trains(tmp_path, weight_path, optimizer, schedule, lr):
    flags = ["--optimizer", optimizer, "--scheduler", schedule, "--lr", str(lr), "--quiet"]
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out"), *flags]
    assert train_with_random.main(arguments) == 0
    rows = read_table(tmp_path / "out" / "ks_chain_rank_4_loss_curves.csv")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_a_run_that_diverges_ends_with_1_keeps_its_curves_and_gives_advice(run, weight_path, tmp_path):
    arguments = ("--lr", "1e30", "--optimizer", "sgd", "--max_grad_norm", 0, "--output_dir", "out")
    done = run("train_with_random.py", "--weight_path", weight_path, *QUICK, *arguments)
    assert done.returncode == 1
    assert re.search(r"not finite at epoch 1, step \d+ of 4; lower --lr", done.stderr)
    rows = read_table(tmp_path / "out" / "ks_chain_rank_4_loss_curves.csv")
    assert rows[0]["train_loss"] == ""
    assert json.loads((tmp_path / "out" / "ks_chain_training_log.json").read_text())["status"] == "diverged"


def test_a_command_line_of_the_2025_script_works(run, weight_path):
    flags = (
        "--rank 2 --bs_last --impl bmm --batch_size 8 --num_epochs 1 --lr 1e-3 --weight_decay 0 --optimizer adam "
        "--scheduler plateau --scheduler_patience 10 --scheduler_factor 0.5 --step_size 30 --gamma 0.1 "
        "--max_grad_norm 1.0 --log_grad_norm --num_samples 80 --val_split 0.2 --output_dir out --save_prefix old "
        "--save_interval 10 --device cpu --dtype float32 --log_interval 2 --verbose"
    )
    done = run("train_with_random.py", "--weight_path", weight_path, *flags.split())
    assert done.returncode == 0, done.stderr
    assert "step 8/8: loss" in done.stderr


@pytest.mark.parametrize(
    ("weight", "flags"),
    [
        (make_weight(64, 64, "normal"), ()),
        (torch.tensor(hadamard(64)) / 8, ("--chain", "butterfly", "--num_factors", 5, "--bs_last")),
    ],
    ids=["grid", "butterfly"],
)
def test_losses_agree_where_small_factors_are_merged(run, tmp_path, weight, flags):
    """Factors are merged for a validation batch, and not for a training batch of 32."""
    torch.save(weight, tmp_path / "weight.pth")
    done = run("train_with_random.py", "--weight_path", "weight.pth", "--rank", 1, "--num_epochs", 4, *flags)
    assert done.returncode == 0, done.stderr
    last = read_curves(tmp_path / "trained_models" / "ks_chain_rank_1_loss_curves.csv")[-1]
    assert last["val_loss"] == pytest.approx(last["population_loss"], rel=0.1, abs=1e-3)
    final = dense_loss(weight, ks.load(tmp_path / "trained_models" / "ks_chain_final.pth"))
    assert final == pytest.approx(last["population_loss"], rel=1e-3, abs=1e-6)


def test_targets_in_another_order_than_the_outputs_are_an_internal_error(weight_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ChainPasses, "output_rows", property(lambda self: torch.arange(self.patterns[0].rows)))
    argv = ["--weight_path", str(weight_path), "--output_dir", str(tmp_path / "out"), "--num_samples", "1000"]
    assert train_with_random.main([*argv, "--num_epochs", "20", "--quiet"]) == 4
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert re.search("InternalError: .*of the same chain allows", errors)
    assert (tmp_path / "out" / "ks_chain_final.pth").exists()


def test_hierarchical_start_is_the_floor_and_best_never_gets_worse(run, weight_path, tmp_path):
    arguments = ("--weight_path", weight_path, *QUICK, "--rank", 2, "--init", "hierarchical", "--output_dir", "out")
    assert run("train_with_random.py", *arguments).returncode == 0
    weight = torch.load(weight_path)
    best = dense_loss(weight, ks.load(tmp_path / "out" / "ks_chain_best.pth"))
    assert best == pytest.approx(floor_of(weight, 2), rel=1e-5)


def test_resuming_compares_the_optimizer_that_auto_stands_for(weight_path, tmp_path, capsys):
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out"), "--quiet"]
    assert train_with_random.main(arguments) == 0
    assert train_with_random.main([*arguments, "--resume", "--optimizer", "gauss_newton"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert train_with_random.main([*arguments, "--resume", "--optimizer", "adamw"]) == 2
    assert "(optimizer was gauss_newton, now adamw)" in capsys.readouterr().err


def test_a_chain_that_gauss_newton_does_not_cover_trains_by_adamw(weight_path, tmp_path, capsys):
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out")]
    assert train_with_random.main([*arguments, "--chain", "lowrank_butterfly"]) == 0
    assert "optimizer adamw: gauss_newton " in capsys.readouterr().err


def test_inverses_that_fail_are_warned_of_once_and_recorded(weight_path, tmp_path, monkeypatch, capsys):
    found = gauss_newton.prefix_grams
    monkeypatch.setattr(gauss_newton, "prefix_grams", lambda values: [-gram for gram in found(values)])
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out"), "--quiet"]
    assert train_with_random.main(arguments) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"WARNING: \d+ curvature matrices were not positive definite in float32; .*", line)
    warning = json.loads((tmp_path / "out" / "ks_chain_config.json").read_text())["warnings"]["optimizer"]
    assert line == f"WARNING: {warning}"


def test_a_run_that_diverges_in_its_first_epoch_closes_its_tracker(weight_path, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(recorder.Tracker, "close", lambda self: closed.append(self.name))
    monkeypatch.setattr(recorder.Tracker, "log", lambda self, curves: None)
    monkeypatch.setattr("ks.training.problem.check_installed", lambda name: None)
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out"), "--quiet"]
    diverging = ["--lr", "1e30", "--optimizer", "sgd", "--max_grad_norm", "0", "--log_to", "trackio"]
    assert train_with_random.main([*arguments, *diverging]) == 1
    assert closed == ["trackio"]
