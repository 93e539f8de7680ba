"""A sweep as its users run it: in a subprocess, from another folder, with files checked afterwards."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import QUICK, ROOT, dense_loss, files_of, floor_of, printed_table, processes_in, read_table, wait_for

import ks
import rank_sweep_study
from ks.bounds.floors import Floor
from ks.bounds.rank_floors import RankFloors
from ks.files import columns, curves
from ks.files.curves import read_curves
from ks.files.layout import SweepFiles
from ks.files.table import filled
from ks.report.read_results import read_study
from ks.study.run_all import Progress

SUMMARY_START = (
    "rank,final_train_loss,final_val_loss,min_train_loss,min_val_loss,min_train_epoch,min_val_epoch,num_epochs"
)
TABLES = {
    "summary": columns.SUMMARY,
    "runs": columns.RUNS,
    "all_curves": columns.ALL_CURVES,
    "floor": columns.FLOOR,
}


def test_a_sweep_writes_the_files_of_the_contract(swept):
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
    assert max(map(len, printed_table(done.stdout)[:8])) <= 100
    rows = read_table(study / "rank_sweep_summary.csv")
    assert [row["rank"] for row in rows] == ["2", "4", "100"]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok (as rank 4)"]
    answer = json.loads((study / "rank_sweep_config.json").read_text())["answer"]
    assert done.stdout.startswith("\n".join(filled(answer)) + "\n\n")
    last = read_table(study / "rank_2" / "rank_2_rank_2_loss_curves.csv")[-1]
    assert last["val_loss"] == rows[0]["final_val_loss"]
    assert [row["rank"] for row in json.loads((study / "rank_sweep_summary.json").read_text())] == [2, 4, 100]
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
    for words in ("floor", "gap", "verdict", "is undertrained: its loss is", "Increase --num_epochs."):
        assert words in swept[1].stdout


def test_the_number_behind_a_verdict_is_in_file_table_and_advice(swept):
    row = read_table(swept[0] / "rank_sweep_results" / "rank_sweep_summary.csv")[0]
    weight = torch.load(swept[0] / "weight.pth")
    predict_zero = weight.square().sum().item() / 16
    expected = (predict_zero - float(row["population_loss"])) / (predict_zero - floor_of(weight, 2))
    assert float(row["removed_share"]) == pytest.approx(expected, rel=1e-6)
    share = f"{expected:.2%}"
    lines = printed_table(swept[1].stdout)
    assert any(line.startswith("Rank 2 is ") and f"{share} of the achievable reduction" in line for line in lines)


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


def test_a_target_chooses_the_ranks_and_names_the_smallest(run, weight_path):
    arguments = ("--weight_path", weight_path, "--target_relative_loss", 0.3, "--dry_run", "--verbose", *QUICK)
    done = run("rank_sweep_study.py", *arguments)
    assert done.returncode == 0, done.stderr
    weight = torch.load(weight_path)
    smallest = next(rank for rank in range(1, 9) if floor_of(weight, rank) <= 0.3 * weight.square().sum() / 16)
    assert f"target 0.3, for isotropic inputs: rank {smallest} is the smallest that reaches it" in done.stdout
    assert f"--rank {smallest} " in done.stdout


@pytest.mark.usefixtures("cold")
def test_another_criterion_leaves_the_floors_out(edited_toolkit, weight_path, tmp_path):
    """The summary and the figures name what trained, and nothing that belongs to the mean squared error."""
    edited_toolkit(criterion="criterion = torch.nn.functional.l1_loss")
    command = [sys.executable, "rank_sweep_study.py", "--weight_path", str(weight_path), "--ranks", "2", *QUICK]
    done = subprocess.run([*command, "--formats", "svg"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stderr.splitlines() if "criterion" in line] == [
        ["criterion", "torch.nn.functional.l1_loss"]
    ]
    study = tmp_path / "rank_sweep_results"
    (row,) = read_table(study / "rank_sweep_summary.csv")
    assert row["final_val_loss"] != ""
    assert row["population_loss"] == row["loss_floor"] == row["verdict"] == ""
    assert read_table(study / "rank_sweep_floor.csv") == []
    label = "loss, torch.nn.functional.l1_loss"
    assert f"<!-- {label}" in (study / "rank_sweep_loss_curves.svg").read_text()
    assert f"<!-- final {label}" in (study / "rank_sweep_final_losses.svg").read_text()
    assert "mean squared error" not in (study / "rank_sweep_loss_curves.svg").read_text()
    assert read_study(SweepFiles(study, "rank_sweep")).loss_label.startswith(label)
    assert not (study / "rank_sweep_floor.svg").exists()
    page = (study / "rank_sweep_report.html").read_text()
    assert "torch.nn.functional.l1_loss of torch" in page
    assert "no floor holds" in page
    assert "The floor is the least" not in page
    assert row["criterion"].startswith("torch.nn.functional.l1_loss of torch")
    assert row["predict_zero_loss"] == ""


def test_every_rank_sees_the_same_validation_set(swept):
    """Ranks above saturation are one model: with the same data they have the same curves."""
    folder, _ = swept
    study = folder / "rank_sweep_results"
    assert ks.make_chain(16, 24).saturation_rank == 4
    curves = [read_curves(files_of(study, rank).curves_csv) for rank in (4, 100)]
    assert [row["val_loss"] for row in curves[0]] == [row["val_loss"] for row in curves[1]]


def test_a_killed_rank_stays_visible_and_does_not_stop_the_others(weight_path, tmp_path):
    command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(weight_path), *QUICK[:4]]
    command += ["--ranks", "1", "2", "4", "--num_epochs", "300", "--jobs", "1", "--output_dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(files_of(tmp_path / "out", 2).curves_csv.exists)
    (rank,) = {*processes_in(tmp_path)} - {process.pid}
    os.kill(rank, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    rows = read_table(tmp_path / "out" / "rank_sweep_summary.csv")
    assert [row["status"] for row in rows] == ["ok", "failed (exit -9)", "ok"]
    assert 0 < int(rows[1]["num_epochs"]) < 300
    assert "epoch" in stderr.split("train.log:")[1]
    assert (tmp_path / "out" / "rank_sweep_final_losses.png").exists()


def test_a_sweep_where_every_rank_diverges_exits_1_and_trains_them_again(run, weight_path, tmp_path):
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
def test_an_interrupted_sweep_summarises_and_leaves_no_process(weight_path, tmp_path, sent):
    command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(weight_path)]
    command += ["--ranks", "1", "2", "--num_epochs", "100000", "--num_samples", "80", "--output_dir", "out"]
    command += ["--jobs", "1"]
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


def test_the_summary_reads_with_pandas_as_the_brief_does(swept):
    df = pd.read_csv(swept[0] / "rank_sweep_results" / "rank_sweep_summary.csv")
    assert df.loc[df["final_val_loss"].idxmin(), "rank"] in (4, 100)


def test_flags_of_old_command_lines_are_taken(run, weight_path):
    flags = ("--ranks", 2, "--plot_title", "T", "--save_plots", "--dry_run")
    done = run("rank_sweep_study.py", "--weight_path", weight_path, *flags)
    assert done.returncode == 0, done.stderr
    config = rank_sweep_study.build_parser().parse(["--weight_path", "w.pth", "--plot_title", "T", "--save_plots"])
    assert (config.title, config.save_plots) == ("T", True)
    assert config == rank_sweep_study.build_parser().parse(["--weight_path", "w.pth", "--title", "T", "--save_plots"])


def test_a_loss_below_its_floor_is_an_internal_error_after_all_is_written(weight_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RankFloors, "floor", lambda floors, rank: Floor(rank, 0.9999, 0.9999, True))
    arguments = ["--weight_path", str(weight_path), "--ranks", "2", "1", *QUICK, "--output_dir", str(tmp_path / "out")]
    assert rank_sweep_study.main(arguments) == 4
    said = capsys.readouterr()
    assert "Traceback" in said.err
    assert "InternalError: rank 1: the population loss, 0." in said.err
    assert "is below its floor, 0.9999" in said.err
    assert said.err.splitlines()[-1].startswith("rank_sweep_study.py: internal error")
    assert "relative_" in printed_table(said.out)[0]
    assert [row["rank"] for row in read_table(tmp_path / "out" / "rank_sweep_summary.csv")] == ["1", "2"]
    for name in ("runs.csv", "all_curves.csv", "summary.json", "loss_curves.png", "final_losses.png", "floor.png"):
        assert (tmp_path / "out" / f"rank_sweep_{name}").stat().st_size > 0


def test_the_end_of_a_sweep_parses_every_file_once(weight_path, tmp_path, monkeypatch, capsys):
    parsed = []  # since the first poll, and outside polls
    polls = []
    read, poll = curves.read_curves, Progress.poll

    def spying_read(path):
        if not polls or polls[-1] == "over":
            parsed.append(path)
        return read(path)

    def watched_poll(progress, running):
        if not polls:
            parsed.clear()  # whatever was looked for before the trainings began
        polls.append("running")
        poll(progress, running)
        polls.append("over")

    monkeypatch.setattr(curves, "read_curves", spying_read)
    monkeypatch.setattr(Progress, "poll", watched_poll)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = ["--weight_path", str(weight_path), "--ranks", "1", "2", *QUICK, "--output_dir", str(tmp_path / "out")]
    assert rank_sweep_study.main(arguments) == 0
    said = capsys.readouterr().err
    assert "rank 2: ok" in said
    assert "6/6 epochs" in said
    assert len(polls) > 4
    assert sorted(parsed) == [files_of(tmp_path / "out", rank).curves_csv for rank in (1, 2)]
