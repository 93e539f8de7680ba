"""A bug is never reported as bad input: it ends with a traceback, exit code 4 and a request to report it."""

import pytest
import torch
from conftest import QUICK, read_table

import example_rank_sweep
import generate_test_weight
import ks.training.problem
import plot_rank_results
import rank_sweep_study
import train_with_random
from ks.files.atomic import read_json
from ks.study import weight_study


def broken(*arguments, **options):
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("script", "place", "name", "arguments"),
    [
        (train_with_random, ks.training.problem, "load_weight", ["--weight_path", "w.pth"]),
        (rank_sweep_study, weight_study, "claim_folder", ["--weight_path", "w.pth", "--ranks", "2"]),
        (plot_rank_results, plot_rank_results, "read_study", ["--results_dir", "."]),
        (generate_test_weight, generate_test_weight, "make_weight", []),
        (example_rank_sweep, example_rank_sweep, "run", []),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bug_has_a_traceback_and_exit_code_4(tmp_path, monkeypatch, capsys, script, place, name, arguments):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.randn(16, 24), "w.pth")
    monkeypatch.setattr(place, name, broken)
    assert script.main(arguments) == 4
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert lines[-2:] == [
        "ValueError: a bug",
        f"{script.__name__}.py: internal error; please report it with the command line",
    ]


def test_a_sweep_shows_the_traceback_of_a_rank_and_trains_the_other(edited_toolkit, run, weight_path, tmp_path):
    edited_toolkit()
    trainer, start = tmp_path / "train_with_random.py", "    weight = problem.internal_weight()\n"
    assert start in trainer.read_text()
    bug = f"{start}    if config.rank == 2:\n        raise ValueError('a bug')\n"
    trainer.write_text(trainer.read_text().replace(start, bug))
    done = run(tmp_path / "rank_sweep_study.py", "--weight_path", weight_path, "--ranks", 1, 2, *QUICK)
    assert done.returncode == 3, done.stderr
    assert "rank 2: failed (exit 4)" in done.stderr
    assert "ValueError: a bug" in done.stderr
    results = tmp_path / "rank_sweep_results"
    assert read_json(results / "rank_2" / "rank_2_training_log.json")["error"] == "ValueError: a bug"
    assert [row["status"] for row in read_table(results / "rank_sweep_summary.csv")] == ["ok", "failed (exit 4)"]
