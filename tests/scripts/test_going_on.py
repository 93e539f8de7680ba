"""A finished study goes on with more epochs, ranks or seeds; flags that would change it are refused."""

import json
import math
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, files_of, read_table

import ks
import train_with_random
from ks.files.curves import read_curves

SMALL = ("--num_samples", "80", "--batch_size", "16")
LOSSES = ("train_loss", "val_loss")


def losses(path):
    return [[row[name] for name in LOSSES] for row in read_curves(path)]


@pytest.fixture
def sweep(run, weight_path):
    def sweep(*arguments, code=0):
        done = run("rank_sweep_study.py", "--weight_path", weight_path, *arguments)
        assert done.returncode == code, done.stderr
        return done

    return sweep


@pytest.fixture
def train(weight_path, tmp_path):
    """Train rank 2 in this process; return its curves file."""

    def train(folder, *arguments, code=0):
        place = ("--weight_path", weight_path, "--output_dir", tmp_path / folder, "--save_prefix", "rank_2")
        arguments = (*place, "--rank", 2, "--quiet", *SMALL, *arguments)
        assert train_with_random.main([*map(str, arguments)]) == code
        return tmp_path / folder / "rank_2_rank_2_loss_curves.csv"

    return train


def test_more_epochs_continue_every_rank_of_a_study(sweep, tmp_path):
    study = tmp_path / "rank_sweep_results"
    sweep("--ranks", 1, 2, *SMALL, "--num_epochs", 2)
    before = {rank: losses(files_of(study, rank).curves_csv) for rank in (1, 2)}
    done = sweep("--num_epochs", 5, "--ranks", 3)
    assert "finished before" not in done.stderr
    for rank in (1, 2):
        rows = read_curves(files_of(study, rank).curves_csv)
        assert losses(files_of(study, rank).curves_csv)[:2] == before[rank]
        assert [row["segment"] for row in rows] == [1, 1, 2, 2, 2]
        whole = 1 - 1 / 4  # the last of the four steps of an epoch
        rates = [1e-3 * (1 + math.cos(math.pi * (epoch + whole) / total)) / 2 for epoch, total in ((1, 2), (2, 5))]
        assert [row["lr"] for row in rows[1:3]] == pytest.approx(rates)
    summary = read_table(study / "rank_sweep_summary.csv")
    assert [(row["rank"], row["num_epochs"], row["segments"]) for row in summary] == [
        ("1", "5", "2 + 3"),
        ("2", "5", "2 + 3"),
        ("3", "5", "5"),
    ]
    assert json.loads((study / "rank_sweep_config.json").read_text())["settings"]["num_epochs"] == 5


def test_a_continued_run_that_stops_and_resumes_has_the_bits_of_one_that_does_not(train, weight_path):
    train("whole", "--num_epochs", 2)
    path = train("whole", "--num_epochs", 8, "--resume")
    rows = read_curves(path)
    train("stopped", "--num_epochs", 2)
    relative = rows[4]["population_loss"] / (torch.load(weight_path).double().square().sum().item() / 16)
    stopped = train("stopped", "--num_epochs", 8, "--resume", "--stop_below", relative * (1 + 1e-9))
    assert losses(stopped) == losses(path)[:5]
    train("stopped", "--num_epochs", 8, "--resume")
    assert losses(stopped) == losses(path)
    assert [row["segment"] for row in read_curves(stopped)] == [1, 1, 2, 2, 2, 2, 2, 2]
    for name in ("final", "best"):
        ours, theirs = (ks.load(place.parent / f"rank_2_{name}.pth").to_dense() for place in (stopped, path))
        assert torch.equal(ours, theirs)


def test_a_run_without_its_resume_state_starts_anew(train):
    path = train("out", "--num_epochs", 2)
    (path.parent / "rank_2_resume.pth").unlink()
    train("out", "--num_epochs", 4, "--resume")
    assert [row["segment"] for row in read_curves(path)] == [1] * 4


def test_flags_that_change_a_study_are_refused_with_two_commands_that_work(sweep, tmp_path):
    sweep("--ranks", 1, *SMALL, "--num_epochs", 3, "--output_dir", "out")
    (tmp_path / "out_2").mkdir()
    for flags, change in ((("--num_epochs", 2), "num_epochs was 3, now 2"), (("--lr", 0.01), "lr was 0.001, now 0.01")):
        error = sweep("--ranks", 1, *flags, "--output_dir", "out", code=2).stderr
        assert f"holds another study ({change}); to keep it: python rank_sweep_study.py " in error
    keep, replace = error.strip().split("; to keep it: ")[1].split("; to replace it: ")
    assert "--output_dir out_3" in keep
    assert replace.endswith("--overwrite")
    for command in (keep, replace):
        python, script, *arguments = shlex.split(command)
        worked = subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, capture_output=True)
        assert worked.returncode == 0, worked.stderr
    for folder in ("out", "out_3"):
        assert json.loads((tmp_path / folder / "rank_sweep_config.json").read_text())["settings"]["lr"] == 0.01


def test_flags_left_out_take_the_values_of_the_study(sweep, tmp_path):
    common = ("--output_dir", "out")
    sweep("--ranks", 1, *SMALL, "--num_epochs", 2, "--lr", 0.003, "--row_splits", 4, 4, "--col_splits", 4, 6, *common)
    done = sweep("--ranks", 2, *common)
    taken = "--row_splits 4 4, --col_splits 4 6, --num_epochs 2, --batch_size 16, --lr 0.003, --num_samples 80"
    assert f"taken from the study in out: {taken}\n" in done.stderr
    assert [row["rank"] for row in read_table(tmp_path / "out" / "rank_sweep_summary.csv")] == ["1", "2"]
    assert "rank 1: finished before" not in done.stderr  # it is not asked for
    assert "chain was" in sweep("--chain", "lowrank", *common, code=2).stderr  # without the splits of the study


def test_nothing_is_taken_from_a_study_of_another_weight(sweep, run, tmp_path):
    sweep("--ranks", 1, *SMALL, "--num_epochs", 2, "--output_dir", "out")
    torch.save(torch.randn(16, 24), tmp_path / "other.pth")
    arguments = ("--weight_path", "other.pth", "--ranks", 2, "--output_dir", "out")
    plan = run("rank_sweep_study.py", *arguments, "--dry_run")
    assert "taken from" not in plan.stderr
    assert [line.split()[0] for line in plan.stdout.splitlines() if "%" in line] == ["2"]
    refused = run("rank_sweep_study.py", *arguments)
    assert refused.returncode == 2
    assert "weight was sha256" in refused.stderr
    assert "--num_epochs" not in refused.stderr.split("to keep it: ")[1]


def test_further_seeds_join_those_of_the_study(sweep, tmp_path):
    sweep("--ranks", 1, *SMALL, "--num_epochs", 2, "--seeds", 3, 4)
    sweep("--seeds", 5)
    runs = read_table(tmp_path / "rank_sweep_results" / "rank_sweep_runs.csv")
    assert [(run["seed"], run["status"]) for run in runs] == [("3", "ok"), ("4", "ok"), ("5", "ok")]
    assert "seed was 3, now 5" in sweep("--seed", 5, code=2).stderr


def test_a_rank_that_is_left_out_keeps_its_row(sweep, tmp_path):
    study = tmp_path / "rank_sweep_results"
    sweep("--ranks", 1, 2, *SMALL, "--num_epochs", 2)
    files_of(study, 2).final.unlink()
    sweep("--max_rank", 1)
    rows = read_table(study / "rank_sweep_summary.csv")
    assert [row["status"] for row in rows] == ["ok", "interrupted (after epoch 2)"]
    assert "rank 2: ok" in sweep().stderr


def test_a_rank_stops_at_the_target(sweep, tmp_path):
    study = tmp_path / "rank_sweep_results"
    target = ("--target_relative_loss", 0.4)
    sweep("--ranks", 1, 2, *SMALL, "--num_epochs", 12, *target, "--stop_at", "target")
    one, two = read_table(study / "rank_sweep_summary.csv")
    assert one["num_epochs"] == "12"  # its floor is above the target
    assert int(two["num_epochs"]) < 12
    assert 0.2 < float(two["relative_loss"]) <= 0.4
    assert two["status"] == "ok"
    assert sweep().stderr.count("finished before") == 2  # a rerun stops at the target of the study
    sweep("--stop_at", "never")
    assert [row["num_epochs"] for row in read_table(study / "rank_sweep_summary.csv")] == ["12", "12"]
    refused = sweep("--stop_at", "target", "--output_dir", "other", code=2)
    assert "--stop_at target needs --target_relative_loss" in refused.stderr


def test_a_rank_stops_at_its_floor(sweep, tmp_path):
    sweep("--ranks", 4, "--num_samples", 800, "--batch_size", 16, "--num_epochs", 10, "--stop_at", "floor")
    (four,) = read_table(tmp_path / "rank_sweep_results" / "rank_sweep_summary.csv")
    assert int(four["num_epochs"]) < 10
    assert four["verdict"].startswith("converged")


def test_a_smaller_rank_above_saturation_joins_without_a_run_of_its_own(sweep, tmp_path):
    study = tmp_path / "rank_sweep_results"
    sweep("--ranks", 9, *SMALL, "--num_epochs", 2)
    assert "rank 9: finished before" in sweep("--ranks", 4, 9).stderr
    assert [row["status"] for row in read_table(study / "rank_sweep_summary.csv")] == ["ok (as rank 9)", "ok"]
    sweep("--num_epochs", 3)
    assert [row["num_epochs"] for row in read_table(study / "rank_sweep_summary.csv")] == ["3", "3"]
    assert len(read_curves(files_of(study, 4).curves_csv)) == 3
