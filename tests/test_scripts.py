"""The five scripts as their users run them: in subprocesses, from another folder, with files checked afterwards."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import QUICK, ROOT
from scipy.linalg import hadamard

import ks
import train_with_random
from ks import results
from ks.chain import ChainPasses
from ks.factorize import loss_floor
from ks.factorize import population_loss as chain_loss
from ks.study import read_study
from ks.weights import load_weight, make_weight

SUMMARY_START = (
    "rank,final_train_loss,final_val_loss,min_train_loss,min_val_loss,min_train_epoch,min_val_epoch,num_epochs"
)


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def population_loss(weight, chain):
    return ((weight.double() - chain.to_dense().double()).square().sum() / len(weight)).item()


def floor_of(weight, rank):
    return loss_floor(weight, ks.make_chain(*weight.shape), [rank])[0].lower


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """One small sweep that several tests look at: (folder, completed process)."""
    folder = tmp_path_factory.mktemp("swept")
    torch.save(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), folder / "weight.pth")
    command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", "weight.pth", *QUICK]
    done = subprocess.run([*command, "--ranks", "4", "2", "4", "100"], cwd=folder, capture_output=True, text=True)
    return folder, done


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
    assert json.loads((folder / "ks_chain_training_log.json").read_text())["status"] == "finished"
    config = json.loads((folder / "ks_chain_config.json").read_text())
    assert config["problem"]["weight"]["sha256"] == load_weight(weight_path).sha256()
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
        relative = population_loss(weight * factor, chain) / (weight * factor).square().sum().item() * 16
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
    assert population_loss(weight, ks.load(tmp_path / "out" / "ks_chain_final.pth")) < limit


@pytest.mark.parametrize("optimizer", [("adamw",), ("adam",), ("sgd", "--lr", "0.5")])
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
    (512, 512, "hadamard", ("--chain", "butterfly", "--num_factors", 9)),
    (256, 256, "hadamard", ("--chain", "butterfly", "--num_factors", 5, "--bs_last")),
]


@pytest.mark.parametrize(("rows", "cols", "kind", "flags"), SMALL_FACTORS, ids=str)
def test_losses_agree_where_small_factors_are_merged(run, tmp_path, rows, cols, kind, flags):
    """At default settings but for the epochs: validation batches are merged, training batches of 32 are not."""
    weight = make_weight(rows, cols, "normal") if kind == "normal" else torch.tensor(hadamard(rows)) / rows**0.5
    torch.save(weight.float(), tmp_path / "weight.pth")
    done = run("train_with_random.py", "--weight_path", "weight.pth", "--rank", 1, "--num_epochs", 8, *flags)
    assert done.returncode == 0, done.stderr
    last = results.read_curves(tmp_path / "trained_models" / "ks_chain_rank_1_loss_curves.csv")[-1]
    assert last["val_loss"] == pytest.approx(last["population_loss"], rel=0.1, abs=1e-3)
    saved = [ks.load(tmp_path / "trained_models" / f"ks_chain_{name}.pth").to_dense() for name in ("best", "final")]
    best, final = ((weight - dense).square().sum() / rows for dense in saved)
    assert final == pytest.approx(last["population_loss"], rel=1e-3, abs=1e-6)
    assert best <= 1.01 * final + 1e-6


def test_targets_in_another_order_than_the_outputs_are_found_out(weight_path, tmp_path, monkeypatch):
    monkeypatch.setattr(ChainPasses, "output_rows", property(lambda self: torch.arange(self.patterns[0].rows)))
    argv = ["--weight_path", str(weight_path), "--output_dir", str(tmp_path / "out"), "--num_samples", "1000"]
    with pytest.raises(train_with_random.InternalError, match="of the same chain allows"):
        train_with_random.main([*argv, "--num_epochs", "20", "--quiet"])
    assert (tmp_path / "out" / "ks_chain_final.pth").exists()


def test_flags_are_not_abbreviated(run, weight_path):
    done = run("train_with_random.py", "--weight_path", weight_path, "--num_epoch", 3)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_keeps_its_epochs(weight_path, tmp_path, sent):
    command = [sys.executable, str(ROOT / "train_with_random.py"), "--weight_path", str(weight_path)]
    command += ["--num_epochs", "100000", "--num_samples", "80", "--output_dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    curves = tmp_path / "out" / "ks_chain_rank_4_loss_curves.csv"
    wait_for(lambda: curves.exists())
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].endswith("interrupted; the epochs so far are kept, --resume goes on")
    assert results.read_curves(curves)
    assert (tmp_path / "out" / "ks_chain_best.pth").exists()


def wait_for(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def test_a_sweep_writes_the_files_of_the_contract(swept):
    folder, done = swept
    assert done.returncode == 0, done.stderr
    study = folder / "rank_sweep_results"
    assert sorted(path.name for path in study.iterdir()) == [
        "rank_100",
        "rank_2",
        "rank_4",
        "rank_sweep_all_curves.csv",
        "rank_sweep_config.json",
        "rank_sweep_final_losses.png",
        "rank_sweep_floor.csv",
        "rank_sweep_floor.png",
        "rank_sweep_loss_curves.png",
        "rank_sweep_runs.csv",
        "rank_sweep_summary.csv",
        "rank_sweep_summary.json",
    ]
    assert sorted(path.name for path in (study / "rank_2").iterdir()) == [
        "rank_2_best.pth",
        "rank_2_config.json",
        "rank_2_final.pth",
        "rank_2_rank_2_loss_curves.csv",
        "rank_2_rank_2_loss_curves.json",
        "rank_2_training_log.json",
        "train.log",
    ]
    assert (study / "rank_sweep_summary.csv").read_text().startswith(SUMMARY_START + ",")
    rows = read_table(study / "rank_sweep_summary.csv")
    assert [row["rank"] for row in rows] == ["2", "4", "100"]
    assert {row["status"] for row in rows} == {"ok"}
    last = read_table(study / "rank_2" / "rank_2_rank_2_loss_curves.csv")[-1]
    assert last["val_loss"] == rows[0]["final_val_loss"]
    assert [row["rank"] for row in json.loads((study / "rank_sweep_summary.json").read_text())] == [2, 4, 100]
    assert "validation loss" in done.stdout
    assert "rank 2: ok" in done.stderr
    assert "\r" not in done.stderr


def test_the_summary_measures_every_rank_against_its_floor(swept):
    study = swept[0] / "rank_sweep_results"
    weight = torch.load(swept[0] / "weight.pth")
    predict_zero = weight.square().sum().item() / 16
    for row in read_table(study / "rank_sweep_summary.csv"):
        rank = int(row["rank"])
        population = population_loss(weight, ks.load(results.rank_files(study, rank).final))
        assert float(row["population_loss"]) == pytest.approx(population, rel=1e-4)
        assert float(row["loss_floor"]) == pytest.approx(floor_of(weight, rank), abs=1e-9 * predict_zero)
        assert float(row["excess"]) == pytest.approx((population - floor_of(weight, rank)) / predict_zero, rel=1e-3)
        assert row["saturated"] == str(rank >= 4)
        assert (row["optimality_gap"] == "") == (rank >= 4)
    for words in ("floor", "gap", "verdict", "undertrained; use more --num_epochs"):
        assert words in swept[1].stdout


def test_hierarchical_start_is_the_floor_and_best_never_gets_worse(run, weight_path, tmp_path):
    arguments = ("--weight_path", weight_path, *QUICK, "--rank", 2, "--init", "hierarchical", "--output_dir", "out")
    assert run("train_with_random.py", *arguments).returncode == 0
    weight = torch.load(weight_path)
    best = population_loss(weight, ks.load(tmp_path / "out" / "ks_chain_best.pth"))
    assert best == pytest.approx(floor_of(weight, 2), rel=1e-5)


def test_seeds_add_runs_and_move_nothing(run, weight_path, tmp_path):
    common = ("rank_sweep_study.py", "--weight_path", weight_path, "--ranks", 2, *QUICK, "--output_dir", "out")
    assert run(*common).returncode == 0
    first = results.rank_files(tmp_path / "out", 2).curves_csv
    alone = [row["val_loss"] for row in results.read_curves(first)]
    done = run(*common, "--seeds", 0, 5)
    assert done.returncode == 0, done.stderr
    second = results.rank_files(tmp_path / "out", 2, 5).curves_csv
    losses = [[row["val_loss"] for row in results.read_curves(path)] for path in (first, second)]
    assert losses[0] == alone
    assert losses[1] != alone
    (row,) = read_table(tmp_path / "out" / "rank_sweep_summary.csv")
    assert float(row["final_val_loss"]) == pytest.approx((losses[0][-1] + losses[1][-1]) / 2)
    assert float(row["final_val_loss_se"]) == pytest.approx(abs(losses[0][-1] - losses[1][-1]) / 2)
    runs = read_table(tmp_path / "out" / "rank_sweep_runs.csv")
    assert [run["seed"] for run in runs] == ["0", "5"]


def test_a_target_chooses_the_ranks_and_names_the_smallest(run, weight_path):
    arguments = ("--weight_path", weight_path, "--target_relative_loss", 0.3, "--dry_run", *QUICK)
    done = run("rank_sweep_study.py", *arguments)
    assert done.returncode == 0, done.stderr
    weight = torch.load(weight_path)
    smallest = next(rank for rank in range(1, 9) if floor_of(weight, rank) <= 0.3 * weight.square().sum() / 16)
    assert f"target 0.3: rank {smallest} is the smallest that reaches it" in done.stdout
    assert f"--rank {smallest} " in done.stdout


def test_chains_side_by_side(run, weight_path, tmp_path):
    for family in ("monarch", "lowrank"):
        arguments = ("--weight_path", weight_path, "--ranks", 1, 2, *QUICK, "--chain", family, "--output_dir", family)
        assert run("rank_sweep_study.py", *arguments).returncode == 0
    done = run("plot_rank_results.py", "--results_dir", "monarch", "lowrank", "--output_dir", "figures")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["rank_sweep_chains.png"]
    assert "lowrank: lowrank (rows" in done.stdout


def test_another_criterion_leaves_the_floors_out(weight_path, tmp_path):
    """The brief sends people to edit the criterion: in a copy of the toolkit, as they would."""
    for name in ("train_with_random.py", "rank_sweep_study.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "ks", tmp_path / "ks")
    trainer = tmp_path / "train_with_random.py"
    edited = trainer.read_text().replace(
        "functional.mse_loss(prediction, target)", "functional.l1_loss(prediction, target)", 1
    )
    trainer.write_text(edited)
    command = [sys.executable, "rank_sweep_study.py", "--weight_path", str(weight_path), "--ranks", "2", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = read_table(tmp_path / "rank_sweep_results" / "rank_sweep_summary.csv")
    assert row["final_val_loss"] != ""
    assert row["population_loss"] == row["loss_floor"] == row["verdict"] == ""


def test_every_rank_sees_the_same_validation_set(swept):
    """Ranks above saturation are one model: with the same data they have the same curves."""
    folder, _ = swept
    study = folder / "rank_sweep_results"
    assert ks.make_chain(16, 24).saturation_rank == 4
    curves = [results.read_curves(results.rank_files(study, rank).curves_csv) for rank in (4, 100)]
    assert [row["val_loss"] for row in curves[0]] == [row["val_loss"] for row in curves[1]]


def test_another_study_in_the_folder_is_named_and_kept(swept, tmp_path):
    shutil.copytree(swept[0], tmp_path / "copy")
    command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", "weight.pth", *QUICK[:4]]
    command += ["--ranks", "2", "--num_epochs", "2", "--chain", "monarch", "--sampling", "whitened", "--device", "cpu"]
    refused = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True)
    assert refused.returncode == 2
    assert "num_epochs was 3, now 2" in refused.stderr
    assert "chain" not in refused.stderr
    assert refused.stderr.count("error") == 1
    study = tmp_path / "copy" / "rank_sweep_results"
    assert len(read_table(study / "rank_sweep_summary.csv")) == 3
    done = subprocess.run([*command, "--overwrite"], cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["num_epochs"] for row in read_table(study / "rank_sweep_summary.csv")] == ["2"]
    assert list(results.find_curves(study)) == [(2, None)]


def test_a_killed_rank_stays_visible_and_does_not_stop_the_others(weight_path, tmp_path):
    command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(weight_path), *QUICK[:4]]
    command += ["--ranks", "1", "2", "4", "--num_epochs", "300", "--output_dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: results.rank_files(tmp_path / "out", 2).curves_csv.exists())
    subprocess.run(["pkill", "-KILL", "-f", "--", f"--rank 2 --resume --output_dir {tmp_path}"], check=True)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    rows = read_table(tmp_path / "out" / "rank_sweep_summary.csv")
    assert [row["status"] for row in rows] == ["ok", "failed (exit -9)", "ok"]
    assert 0 < int(rows[1]["num_epochs"]) < 300
    assert "epoch" in stderr.split("train.log:")[1]
    assert (tmp_path / "out" / "rank_sweep_final_losses.png").exists()


def test_a_sweep_where_every_rank_diverges_exits_1(run, weight_path, tmp_path):
    wild = ("--lr", "1e30", "--optimizer", "sgd", "--max_grad_norm", 0)
    done = run("rank_sweep_study.py", "--weight_path", weight_path, "--ranks", 1, 2, *QUICK, *wild)
    assert done.returncode == 1
    assert "lower --lr" in done.stderr
    rows = read_table(tmp_path / "rank_sweep_results" / "rank_sweep_summary.csv")
    assert [row["status"] for row in rows] == ["diverged", "diverged"]
    assert [row["final_val_loss"] for row in rows] == ["", ""]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_summarises_and_leaves_no_process(weight_path, tmp_path, sent):
    command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(weight_path)]
    command += ["--ranks", "1", "2", "--num_epochs", "100000", "--num_samples", "80", "--output_dir", "out"]
    command += ["--seeds", "0", "1"] if sent == signal.SIGTERM else []
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: results.rank_files(tmp_path / "out", 2).curves_csv.exists())  # the larger one comes first
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == 130
    rows = read_table(tmp_path / "out" / "rank_sweep_summary.csv")
    assert [row["status"].split(" ")[0] for row in rows] == ["interrupted", "interrupted"]
    assert int(rows[1]["num_epochs"]) > 0
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""


def test_dry_run_prints_the_plan_and_commands_that_work(run, weight_path, tmp_path):
    done = run("rank_sweep_study.py", "--weight_path", weight_path.name, "--ranks", 2, 4, 9, "--dry_run", *QUICK)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "rank_sweep_results").exists()
    plan = done.stdout.splitlines()
    assert plan[0].startswith("saturation: from rank 4 on")
    assert "(1, 4, 8, 4) (4, 8, 6, 1)" in plan[3]
    assert "saturated, larger than dense" in plan[5]
    commands = [line for line in plan if "train_with_random.py" in line]
    assert len(commands) == 3
    assert subprocess.run(commands[0], shell=True, cwd="/", capture_output=True).returncode == 0
    assert (tmp_path / "rank_sweep_results" / "rank_2" / "rank_2_final.pth").exists()


def test_the_generator_prints_statistics_and_protects_what_is_there(run, tmp_path):
    arguments = ("--output_features", 8, "--input_features", 12, "--output_path", "w.pth")
    first = run("generate_test_weight.py", *arguments, "--dtype", "float16", "--init_method", "kaiming_normal")
    assert first.returncode == 0, first.stderr
    assert "Frobenius norm" in first.stdout
    assert load_weight(tmp_path / "w.pth").tensor.dtype == torch.float16
    again = run("generate_test_weight.py", *arguments, "--dtype", "float16", "--init_method", "kaiming_normal")
    assert again.returncode == 0
    other = run("generate_test_weight.py", *arguments)
    assert other.returncode == 2
    assert "--overwrite" in other.stderr
    assert load_weight(tmp_path / "w.pth").tensor.dtype == torch.float16
    assert run("generate_test_weight.py", *arguments, "--overwrite").returncode == 0


def test_the_demo_runs_from_any_folder_and_tells_where_the_pictures_are(run, tmp_path):
    done = run("example_rank_sweep.py", "--ranks", 2, 4, "--num_epochs", 1, "--num_samples", 200)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "demo_rank_sweep_results"
    assert (study / "rank_sweep_loss_curves.png").exists()
    assert str(study) in done.stdout
    assert "validation loss" in done.stdout


def test_the_demo_passes_a_failure_on(run):
    done = run("example_rank_sweep.py", "--ranks", 0)
    assert done.returncode == 2
    assert "rank_sweep_study.py ended with exit code 2" in done.stderr


def test_replotting_from_files_alone_gives_the_same_summary(run, swept, tmp_path):
    study = swept[0] / "rank_sweep_results"
    arguments = ("--results_dir", study, "--output_dir", "figures", "--log_scale", "--formats", "png", "svg", "pdf")
    done = run("plot_rank_results.py", *arguments, "--title", "T", "--dpi", 50, "--figsize", 6, 3)
    assert done.returncode == 0, done.stderr
    stems = ("rank_sweep_final_losses", "rank_sweep_floor", "rank_sweep_loss_curves")
    expected = sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg", "pdf"))
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == expected
    assert done.stdout.splitlines()[:4] == swept[1].stdout.splitlines()[:4]


def test_a_folder_of_the_2025_scripts_plots(run, tmp_path):
    for rank in (2, 16):
        folder = tmp_path / "old" / f"rank_{rank}"
        folder.mkdir(parents=True)
        rows = "\n".join(f"{epoch},{1 / epoch + 1 / rank},{1.1 / epoch + 1 / rank},{rank}" for epoch in range(1, 6))
        (folder / f"rank_{rank}_rank_{rank}_loss_curves.csv").write_text(f"epoch,train_loss,val_loss,rank\n{rows}\n")
    (tmp_path / "old" / "rank_sweep_summary.json").write_text('[{"rank": 2, "final_val_loss": 0.72}]')
    done = run("plot_rank_results.py", "--results_dir", "old")
    assert done.returncode == 0, done.stderr
    study = read_study(results.SweepFiles(tmp_path / "old", "rank_sweep"))
    assert list(study.summary["num_seeds"]) == [1, 1]
    assert (tmp_path / "old" / "rank_sweep_loss_curves.png").exists()
    assert "0.2825" in done.stdout


def test_the_summary_reads_with_pandas_as_the_brief_does(swept):
    df = pd.read_csv(swept[0] / "rank_sweep_results" / "rank_sweep_summary.csv")
    assert df.loc[df["final_val_loss"].idxmin(), "rank"] in (4, 100)


def test_the_hierarchical_start_of_three_factors_is_the_upper_bound(tmp_path, weight_path):
    from ks.problem import resolve

    arguments = ["--weight_path", str(weight_path), "--init", "hierarchical", "--chain", "butterfly", "--rank", "2"]
    config = train_with_random.build_parser().parse_config(arguments)
    problem = resolve(config)
    weight = problem.internal_weight()
    start = chain_loss(weight, train_with_random.make_model(config, problem, weight).factors)
    (floor,) = loss_floor(weight, problem.chain, [2])
    assert start == pytest.approx(floor.upper, rel=1e-5)
    assert floor.lower < floor.upper


def test_a_criterion_that_weighs_outputs_trains(weight_path, tmp_path, monkeypatch):

    weights = torch.linspace(0.5, 1.5, 16)
    monkeypatch.setattr(train_with_random, "criterion", lambda p, t: (weights * (p - t).square()).mean())
    arguments = ["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out"), "--quiet"]
    assert train_with_random.main(arguments) == 0
    rows = read_table(tmp_path / "out" / "ks_chain_rank_4_loss_curves.csv")
    assert {row["population_loss"] for row in rows} == {""}


def test_an_unforeseen_error_is_logged_as_a_failure(weight_path, tmp_path, monkeypatch):

    def broken(prediction, target):
        raise ArithmeticError("no sums today")

    monkeypatch.setattr(train_with_random, "criterion", broken)
    with pytest.raises(ArithmeticError):
        train_with_random.main(["--weight_path", str(weight_path), *QUICK, "--output_dir", str(tmp_path / "out")])
    log = json.loads((tmp_path / "out" / "ks_chain_training_log.json").read_text())
    assert log["status"] == "failed"
    assert "no sums today" in log["error"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_a_summary_and_no_process(tmp_path, sent):
    command = [sys.executable, str(ROOT / "example_rank_sweep.py"), "--output_dir", str(tmp_path / "demo")]
    process = subprocess.Popen([*command, "--ranks", "2", "--num_epochs", "100000"], stderr=subprocess.DEVNULL)
    wait_for(lambda: results.rank_files(tmp_path / "demo", 2).curves_csv.exists())
    process.send_signal(sent)
    assert process.wait(60) == 130
    assert read_table(tmp_path / "demo" / "rank_sweep_summary.csv")[0]["status"] == "interrupted"
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""
