"""One training as its users run it: in a subprocess, from another folder, with files checked afterwards."""

import json
import re

import pytest
import torch
from conftest import QUICK, dense_loss, floor_of, read_table
from scipy.linalg import hadamard

import ks
import train_with_random
from ks.bounds.population_loss import population_loss
from ks.chain.passes import ChainPasses
from ks.files.curves import read_curves
from ks.files.make_weight import make_weight
from ks.files.weights import load_weight
from ks.training import gauss_newton, recorder
from ks.training.problem import resolve
from ks.training.trainable_chain import TrainableChain


def test_training_writes_the_files_of_the_contract(run, weight_path, tmp_path):
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
    assert done.stdout.startswith("rank 4: validation loss")


def test_a_rerun_replaces_its_own_files(run, weight_path, tmp_path):
    common = ("train_with_random.py", "--weight_path", weight_path, *QUICK[:4], "--output_dir", "out", "--quiet")
    run(*common, "--num_epochs", 4, "--save_interval", 1)
    again = run(*common, "--num_epochs", 2)
    assert again.returncode == 0
    assert again.stderr == ""
    assert len(read_table(tmp_path / "out" / "ks_chain_rank_4_loss_curves.csv")) == 2
    assert not list((tmp_path / "out").glob("*_epoch_*.pth"))


def test_relative_curves_do_not_depend_on_the_scale_of_weight_or_inputs(run, weight_path, tmp_path):
    weight = torch.load(weight_path)
    curves = []
    for name, factor, std in (("plain", 1.0, 1.0), ("large", 1e3, 1.0), ("small", 1e-3, 10.0)):
        torch.save(weight * factor, tmp_path / f"{name}.pth")
        arguments = ("--weight_path", f"{name}.pth", "--input_std", std, "--output_dir", name)
        assert run("train_with_random.py", *arguments, *QUICK).returncode == 0
        rows = read_table(tmp_path / name / "ks_chain_rank_4_loss_curves.csv")
        curves.append([float(row["val_loss"]) / (factor * std) ** 2 for row in rows])
        chain = ks.load(tmp_path / name / "ks_chain_final.pth")
        relative = dense_loss(weight * factor, chain) / (weight * factor).square().sum().item() * 16
        curves[-1].append(relative)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[2] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize("layout", [(), ("--bs_last",)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_exact_chain_is_learned_in_every_dtype_and_layout(run, tmp_path, dtype, layout):
    weight = make_weight(16, 24, "exact_chain", chain=ks.make_chain(16, 24), rank=2)
    torch.save(weight, tmp_path / "exact.pth")
    arguments = ("--weight_path", "exact.pth", "--rank", 2, "--num_samples", 2000, "--num_epochs", 10, "--dtype", dtype)
    done = run("train_with_random.py", *arguments, *layout, "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    limit = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-3}[dtype]
    assert dense_loss(weight, ks.load(tmp_path / "out" / "ks_chain_final.pth")) < limit


@pytest.mark.parametrize("optimizer", [("gauss_newton",), ("adamw",), ("adam",), ("sgd", "--lr", "0.5")])
@pytest.mark.parametrize("scheduler", ["cosine", "plateau", "step", "none"])
def test_every_optimizer_and_schedule_trains(capsys, tmp_path, weight_path, optimizer, scheduler):
    name, *rate = optimizer
    arguments = ["--weight_path", str(weight_path), *QUICK, "--optimizer", name, "--scheduler", scheduler, *rate]
    assert train_with_random.main([*arguments, "--output_dir", str(tmp_path / "out"), "--quiet"]) == 0
    rows = read_table(tmp_path / "out" / "ks_chain_rank_4_loss_curves.csv")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_divergence_is_exit_1_with_curves_kept_and_advice(run, weight_path, tmp_path):
    arguments = ("--lr", "1e30", "--optimizer", "sgd", "--max_grad_norm", 0, "--output_dir", "out")
    done = run("train_with_random.py", "--weight_path", weight_path, *QUICK, *arguments)
    assert done.returncode == 1
    assert re.search(r"not finite at epoch 1, step \d+ of 4; lower --lr", done.stderr)
    rows = read_table(tmp_path / "out" / "ks_chain_rank_4_loss_curves.csv")
    assert rows[0]["train_loss"] == ""
    assert json.loads((tmp_path / "out" / "ks_chain_rank_4_loss_curves.json").read_text())["train_losses"] == [None]
    assert json.loads((tmp_path / "out" / "ks_chain_training_log.json").read_text())["status"] == "diverged"


def test_every_flag_of_the_2025_script_is_taken(run, weight_path):
    flags = (
        "--rank 2 --bs_last --impl bmm --batch_size 8 --num_epochs 1 --lr 1e-3 --weight_decay 0 --optimizer adam "
        "--scheduler plateau --scheduler_patience 10 --scheduler_factor 0.5 --step_size 30 --gamma 0.1 "
        "--max_grad_norm 1.0 --log_grad_norm --num_samples 80 --val_split 0.2 --output_dir out --save_prefix old "
        "--save_interval 10 --device cpu --dtype float32 --log_interval 2 --verbose"
    )
    done = run("train_with_random.py", "--weight_path", weight_path, *flags.split())
    assert done.returncode == 0, done.stderr
    assert "step 8/8: loss" in done.stderr


SMALL_FACTORS = [
    (64, 64, "normal", ()),
    (64, 64, "normal", ("--batch_size", 256)),
    (256, 256, "hadamard", ("--chain", "butterfly", "--num_factors", 5, "--bs_last")),
]


@pytest.mark.parametrize(("rows", "cols", "kind", "flags"), SMALL_FACTORS, ids=str)
def test_losses_agree_where_small_factors_are_merged(run, tmp_path, rows, cols, kind, flags):
    """At default settings but for the epochs: validation batches are merged, training batches of 32 are not."""
    weight = make_weight(rows, cols, "normal") if kind == "normal" else torch.tensor(hadamard(rows)) / rows**0.5
    torch.save(weight.float(), tmp_path / "weight.pth")
    done = run("train_with_random.py", "--weight_path", "weight.pth", "--rank", 1, "--num_epochs", 4, *flags)
    assert done.returncode == 0, done.stderr
    last = read_curves(tmp_path / "trained_models" / "ks_chain_rank_1_loss_curves.csv")[-1]
    assert last["val_loss"] == pytest.approx(last["population_loss"], rel=0.1, abs=1e-3)
    saved = [ks.load(tmp_path / "trained_models" / f"ks_chain_{name}.pth").to_dense() for name in ("best", "final")]
    best, final = ((weight - dense).square().sum() / rows for dense in saved)
    assert final == pytest.approx(last["population_loss"], rel=1e-3, abs=1e-6)
    assert best <= 1.01 * final + 1e-6


def test_targets_in_another_order_than_the_outputs_are_found_out(weight_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ChainPasses, "output_rows", property(lambda self: torch.arange(self.patterns[0].rows)))
    argv = ["--weight_path", str(weight_path), "--output_dir", str(tmp_path / "out"), "--num_samples", "1000"]
    assert train_with_random.main([*argv, "--num_epochs", "20", "--quiet"]) == 4
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert re.search("InternalError: .*of the same chain allows", errors)
    assert (tmp_path / "out" / "ks_chain_final.pth").exists()


def test_flags_are_not_abbreviated(run, weight_path):
    done = run("train_with_random.py", "--weight_path", weight_path, "--num_epoch", 3)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_hierarchical_start_is_the_floor_and_best_never_gets_worse(run, weight_path, tmp_path):
    arguments = ("--weight_path", weight_path, *QUICK, "--rank", 2, "--init", "hierarchical", "--output_dir", "out")
    assert run("train_with_random.py", *arguments).returncode == 0
    weight = torch.load(weight_path)
    best = dense_loss(weight, ks.load(tmp_path / "out" / "ks_chain_best.pth"))
    assert best == pytest.approx(floor_of(weight, 2), rel=1e-5)


def test_the_hierarchical_start_of_three_factors_is_the_upper_bound(tmp_path, weight_path):
    arguments = ["--weight_path", str(weight_path), "--init", "hierarchical", "--chain", "butterfly", "--rank", "2"]
    config = train_with_random.build_parser().parse(arguments)
    problem = resolve(config)
    weight = problem.internal_weight()
    start = population_loss(weight, TrainableChain(config, problem, weight).factors)
    (floor,) = ks.loss_floor(weight, problem.chain, [2])
    assert start == pytest.approx(floor.upper, rel=1e-5)
    assert floor.lower < floor.upper


@pytest.mark.parametrize("optimizer", ["auto", "gauss_newton"])
def test_a_chain_that_gauss_newton_does_not_cover(weight_path, tmp_path, capsys, optimizer):
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out")]
    code = train_with_random.main([*arguments, "--chain", "lowrank_butterfly", "--optimizer", optimizer])
    said = capsys.readouterr().err
    if optimizer == "auto":
        assert code == 0
        assert "optimizer adamw: gauss_newton " in said
    else:
        assert code == 2
        assert len(said.splitlines()) == 1


def test_resuming_compares_the_optimizer_that_auto_stands_for(weight_path, tmp_path, capsys):
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out"), "--quiet"]
    assert train_with_random.main(arguments) == 0
    assert train_with_random.main([*arguments, "--resume", "--optimizer", "gauss_newton"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert train_with_random.main([*arguments, "--resume", "--optimizer", "adamw"]) == 2
    assert "(optimizer was gauss_newton, now adamw)" in capsys.readouterr().err


def test_inverses_that_fail_are_said_once_and_recorded(weight_path, tmp_path, monkeypatch, capsys):
    found = gauss_newton.prefix_grams
    monkeypatch.setattr(gauss_newton, "prefix_grams", lambda values: [-gram for gram in found(values)])
    monkeypatch.setattr(gauss_newton, "LOSS_DAMPING", 0.0)
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out"), "--quiet"]
    assert train_with_random.main(arguments) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"WARNING: \d+ curvature matrices were not positive definite in float32; .*", line)
    warning = json.loads((tmp_path / "out" / "ks_chain_config.json").read_text())["warnings"]["optimizer"]
    assert line == f"WARNING: {warning}"


def test_an_unforeseen_error_is_logged_as_a_failure(weight_path, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ArithmeticError("no sums today")

    monkeypatch.setattr(train_with_random, "validate", broken)
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out")]
    assert train_with_random.main(arguments) == 4
    assert "ArithmeticError: no sums today" in capsys.readouterr().err
    log = json.loads((tmp_path / "out" / "ks_chain_training_log.json").read_text())
    assert log["status"] == "failed"
    assert "no sums today" in log["error"]


def test_the_last_line_has_the_exact_loss_of_the_curves(weight_path, tmp_path, capsys):
    """Not the sampled validation loss over the expected loss of predicting 0, which may be above 100%."""
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out"), "--quiet"]
    assert train_with_random.main(arguments) == 0
    last = read_curves(tmp_path / "out" / "ks_chain_rank_4_loss_curves.csv")[-1]
    weight = torch.load(weight_path)
    relative = last["population_loss"] / (weight.square().sum().item() / 16)
    assert f"validation loss {last['val_loss']:.6g}, relative loss {relative:.2%}; " in capsys.readouterr().out


def test_a_run_that_diverges_in_its_first_epoch_closes_its_tracker(weight_path, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(recorder.Tracker, "close", lambda self: closed.append(self.name))
    monkeypatch.setattr(recorder.Tracker, "log", lambda self, curves: None)
    monkeypatch.setattr("ks.training.problem.check_installed", lambda name: None)
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out"), "--quiet"]
    diverging = ["--lr", "1e30", "--optimizer", "sgd", "--max_grad_norm", "0", "--log_to", "trackio"]
    assert train_with_random.main([*arguments, *diverging]) == 1
    assert closed == ["trackio"]
