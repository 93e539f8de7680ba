"""One sweep as users start it: a subprocess in another folder, whose files are checked afterwards."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import QUICK, ROOT, dense_loss, files_of, floor_of, processes_in, read_table, runs_in, wait_for

import ks
import rank_sweep_study
from ks.bounds.floors import Floor
from ks.bounds.rank_floors import RankFloors
from ks.files import columns
from ks.files.curves import read_curves
from ks.files.table import filled

SUMMARY_START = (
    "rank,final_train_loss,final_val_loss,min_train_loss,min_val_loss,min_train_epoch,min_val_epoch,num_epochs"
)
TABLES = {
    "summary": columns.SUMMARY,
    "runs": columns.RUNS,
    "all_curves": columns.ALL_CURVES,
    "floor": columns.FLOOR,
}


def printed_table(text: str) -> list[str]:
    """The lines of the table that a sweep prints, from its header on."""
    return text.split("\n\n", 1)[1].splitlines()


def test_a_sweep_writes_the_documented_files(swept):
    folder, done = swept
    assert done.returncode == 0, done.stderr
    study = folder / "rank_sweep_results"
    assert sorted(path.name for path in study.iterdir()) == [
        "rank_100",
        "rank_2",
        "rank_4",
        "rank_sweep_all_curves.csv",
        "rank_sweep_bounds.npz",
        "rank_sweep_config.json",
        "rank_sweep_final_losses.png",
        "rank_sweep_floor.csv",
        "rank_sweep_floor.png",
        "rank_sweep_front.png",
        "rank_sweep_gap.png",
        "rank_sweep_loss_curves.png",
        "rank_sweep_report.html",
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
        "rank_2_resume.pth",
        "rank_2_training_log.json",
        "train.log",
    ]
    assert (study / "rank_sweep_summary.csv").read_text().startswith(SUMMARY_START + ",")
    for name, declared in TABLES.items():
        assert list(read_table(study / f"rank_sweep_{name}.csv")[0]) == columns.names(declared)
    assert list(json.loads((study / "rank_sweep_summary.json").read_text())[0]) == columns.names(columns.SUMMARY)
    assert printed_table(done.stdout)[1].split() == ["rank", "loss", "floor", "gap", "of_dense", "status", "verdict"]
    rows = read_table(study / "rank_sweep_summary.csv")
    assert [row["rank"] for row in rows] == ["2", "4", "100"]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok (as rank 4)"]
    answer = json.loads((study / "rank_sweep_config.json").read_text())["answer"]
    assert done.stdout.startswith("\n".join(filled(answer)) + "\n\n")
    last = read_table(study / "rank_2" / "rank_2_rank_2_loss_curves.csv")[-1]
    assert last["val_loss"] == rows[0]["final_val_loss"]
    assert "rank 2: ok" in done.stderr
    assert "\r" not in done.stderr


def test_the_summary_measures_every_rank_against_its_floor(swept):
    study = swept[0] / "rank_sweep_results"
    weight = torch.load(swept[0] / "weight.pth")
    predict_zero = weight.square().sum().item() / 16
    for row in read_table(study / "rank_sweep_summary.csv"):
        rank = int(row["rank"])
        population = dense_loss(weight, ks.load(files_of(study, rank).final))
        assert float(row["population_loss"]) == pytest.approx(population, rel=1e-4)
        assert float(row["loss_floor"]) == pytest.approx(floor_of(weight, rank), abs=1e-9 * predict_zero)
        assert float(row["excess"]) == pytest.approx((population - floor_of(weight, rank)) / predict_zero, rel=1e-3)
        assert row["saturated"] == str(rank >= 4)
        assert (row["optimality_gap"] == "") == (rank >= 4)
    assert "is undertrained: its loss is" in swept[1].stdout


def test_seeds_add_runs_and_move_nothing(run, weight_path, tmp_path):
    common = ("rank_sweep_study.py", "--weight_path", weight_path, "--ranks", 2, *QUICK, "--output_dir", "out")
    assert run(*common).returncode == 0
    first = files_of(tmp_path / "out", 2).curves_csv
    alone = [row["val_loss"] for row in read_curves(first)]
    done = run(*common, "--seeds", 0, 5)
    assert done.returncode == 0, done.stderr
    second = tmp_path / "out" / "rank_2" / "seed_5" / "rank_2_rank_2_loss_curves.csv"
    losses = [[row["val_loss"] for row in read_curves(path)] for path in (first, second)]
    assert losses[0] == alone
    assert losses[1] != alone
    (row,) = read_table(tmp_path / "out" / "rank_sweep_summary.csv")
    assert float(row["final_val_loss"]) == pytest.approx((losses[0][-1] + losses[1][-1]) / 2)
    assert float(row["final_val_loss_se"]) == pytest.approx(abs(losses[0][-1] - losses[1][-1]) / 2)
    runs = read_table(tmp_path / "out" / "rank_sweep_runs.csv")
    assert [run["seed"] for run in runs] == ["0", "5"]


def test_a_target_chooses_the_ranks(run, weight_path):
    arguments = ("--weight_path", weight_path, "--target_relative_loss", 0.3, "--dry_run", "--verbose", *QUICK)
    done = run("rank_sweep_study.py", *arguments)
    assert done.returncode == 0, done.stderr
    weight = torch.load(weight_path)
    smallest = next(rank for rank in range(1, 9) if floor_of(weight, rank) <= 0.3 * weight.square().sum() / 16)
    assert (
        f"target 30% of the output energy, for isotropic inputs: rank {smallest} is the smallest that can reach it"
        in done.stdout
    )
    assert f"--rank {smallest} " in done.stdout


def test_a_killed_rank_stays_visible_and_does_not_stop_the_others(weight_path, tmp_path):
    command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(weight_path), *QUICK[:4]]
    command += ["--ranks", "1", "2", "4", "--num_epochs", "300", "--jobs", "1", "--output_dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(files_of(tmp_path / "out", 2).curves_csv.exists)
    (rank,) = runs_in(tmp_path)
    os.kill(rank, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    rows = read_table(tmp_path / "out" / "rank_sweep_summary.csv")
    assert [row["status"] for row in rows] == ["ok", "failed (exit -9)", "ok"]
    assert 0 < int(rows[1]["num_epochs"]) < 300
    assert "epoch" in stderr.split("train.log:")[1]
    assert (tmp_path / "out" / "rank_sweep_final_losses.png").exists()


def test_a_sweep_whose_ranks_all_diverge_ends_with_1_and_trains_them_again(run, weight_path, tmp_path):
    wild = ("--lr", "1e30", "--optimizer", "sgd", "--max_grad_norm", 0)
    for _ in range(2):
        done = run("rank_sweep_study.py", "--weight_path", weight_path, "--ranks", 1, 2, *QUICK, *wild)
        assert done.returncode == 1
        assert "rank 2: training (1 of 2)" in done.stderr
        assert "lower --lr" in done.stderr
    rows = read_table(tmp_path / "rank_sweep_results" / "rank_sweep_summary.csv")
    assert [row["status"] for row in rows] == ["diverged", "diverged"]
    assert [row["final_val_loss"] for row in rows] == ["", ""]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_writes_a_summary_and_leaves_no_process(weight_path, tmp_path, sent):
    command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(weight_path)]
    command += ["--ranks", "1", "2", "--num_epochs", "100000", *QUICK[:4], "--output_dir", "out", "--jobs", "1"]
    command += ["--seeds", "0", "1"] if sent == signal.SIGTERM else []
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(files_of(tmp_path / "out", 2).curves_csv.exists)  # the larger one comes first
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == 130
    rows = read_table(tmp_path / "out" / "rank_sweep_summary.csv")
    assert [row["status"].split(" ")[0] for row in rows] == ["not", "interrupted"]
    assert int(rows[1]["num_epochs"]) > 0
    assert not (tmp_path / "out" / "rank_1").exists()
    assert not processes_in(tmp_path)


def test_dry_run_prints_the_plan_and_commands_that_work(run, weight_path, tmp_path):
    arguments = ("--weight_path", weight_path.name, "--ranks", 2, 4, 9, "--dry_run", *QUICK)
    done = run("rank_sweep_study.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "rank_sweep_results").exists()
    plan = done.stdout.splitlines()
    assert plan[0] == "weight.pth, 16 × 24: monarch (rows 4·4, columns 4·6), isotropic inputs"
    assert plan[1].startswith("saturation: from rank 4 on")
    assert plan[8].endswith("saturated, larger than dense")
    assert "train_with_random.py" not in done.stdout
    assert max(map(len, plan)) <= 100
    plan = run("rank_sweep_study.py", *arguments, "--verbose").stdout.splitlines()
    commands = [line for line in plan if "train_with_random.py" in line]
    assert len(commands) == 3
    assert subprocess.run(commands[0], shell=True, cwd="/", capture_output=True).returncode == 0
    assert (tmp_path / "rank_sweep_results" / "rank_2" / "rank_2_final.pth").exists()


def test_a_loss_below_its_floor_is_an_internal_error_after_all_is_written(weight_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RankFloors, "floor", lambda floors, rank: Floor(rank, 0.9999, 0.9999, True))
    arguments = ["--weight_path", str(weight_path), "--ranks", "2", "1", *QUICK, "--output_dir", str(tmp_path / "out")]
    assert rank_sweep_study.main(arguments) == 4
    printed = capsys.readouterr()
    assert "Traceback" in printed.err
    assert re.search("InternalError: rank 1: the population loss, 0.* is below its floor, 0.9999", printed.err)
    assert "relative_" in printed_table(printed.out)[0]
    assert [row["rank"] for row in read_table(tmp_path / "out" / "rank_sweep_summary.csv")] == ["1", "2"]
    assert (tmp_path / "out" / "rank_sweep_report.html").exists()
