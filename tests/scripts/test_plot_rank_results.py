"""Figures drawn again from files, as users do it."""

import html
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import QUICK, ROOT, files_of, read_table

from ks.files.curves import read_curves, write_curves
from ks.files.layout import SweepFiles
from ks.report.read_results import read_study


@pytest.mark.usefixtures("cold")
def test_replotting_from_files_alone_gives_the_same_summary(run, swept, tmp_path):
    study = swept[0] / "rank_sweep_results"
    arguments = ("--results_dir", study, "--output_dir", "figures", "--log_scale", "--formats", "png", "svg")
    done = run("plot_rank_results.py", *arguments, "--dpi", 50)
    assert done.returncode == 0, done.stderr
    names = ("final_losses", "floor", "front", "gap", "loss_curves")
    figures = {f"rank_sweep_{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == figures | {"rank_sweep_figures.json"}
    table = done.stdout.index("\n\n") + 400
    assert done.stdout[:table] == swept[1].stdout[:table]


def test_a_folder_of_the_2025_scripts_plots(run, tmp_path):
    for rank in (2, 16):
        folder = tmp_path / "old" / f"rank_{rank}"
        folder.mkdir(parents=True)
        rows = "\n".join(f"{epoch},{1 / epoch + 1 / rank},{1.1 / epoch + 1 / rank},{rank}" for epoch in range(1, 6))
        (folder / f"rank_{rank}_rank_{rank}_loss_curves.csv").write_text(f"epoch,train_loss,val_loss,rank\n{rows}\n")
    (tmp_path / "old" / "rank_sweep_summary.json").write_text('[{"rank": 2, "final_val_loss": 0.72}]')
    done = run("plot_rank_results.py", "--results_dir", "old")
    assert done.returncode == 0, done.stderr
    study = read_study(SweepFiles(tmp_path / "old", "rank_sweep"))
    assert list(study.summary["num_seeds"]) == [1, 1]
    assert (tmp_path / "old" / "rank_sweep_loss_curves.png").exists()
    assert "0.2825" in done.stdout


def blocks_about_style() -> list[str]:
    """The fenced blocks of docs/files.md on the style of figures: a matplotlibrc file, a command, a snippet."""
    page = (ROOT / "docs" / "files.md").read_text().partition("## The style of figures\n")[2].partition("\n## ")[0]
    return re.findall(r"^```\w*\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def test_the_documented_style_is_honoured(run, swept, tmp_path):
    study = swept[0] / "rank_sweep_results"
    (tmp_path / "style").write_text(blocks_about_style()[0] + "svg.fonttype: none\n")
    environment = {"MATPLOTLIBRC": str(tmp_path / "style")}
    flags = ("--output_dir", "figures", "--formats", "svg")
    done = run("plot_rank_results.py", "--results_dir", study, *flags, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    for path in (tmp_path / "figures").glob("*.svg"):
        assert "fill: #222222" in path.read_text()
        assert "serif" in path.read_text()


def test_the_snippet_on_figures_runs_as_written(swept, tmp_path):
    shutil.copytree(swept[0], tmp_path, dirs_exist_ok=True)
    command = [sys.executable, "-c", blocks_about_style()[2]]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine.png").exists()


def test_the_command_in_the_report_reproduces_the_study(run, swept, tmp_path):
    page = (swept[0] / "rank_sweep_results" / "rank_sweep_report.html").read_text()
    _, script, *arguments = shlex.split(html.unescape(re.search(r"<code>(.*?)</code>", page)[1]))
    shutil.copy(swept[0] / "weight.pth", tmp_path)
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    for name in ("rank", "final_val_loss", "population_loss", "verdict"):
        again, before = (
            [row[name] for row in read_table(folder / "rank_sweep_results" / "rank_sweep_summary.csv")]
            for folder in (tmp_path, swept[0])
        )
        assert again == before


def test_a_metric_is_drawn_without_another_run_where_it_is_asked_for(run, swept, tmp_path):
    shutil.copytree(swept[0], tmp_path, dirs_exist_ok=True)
    files = SweepFiles(tmp_path / "rank_sweep_results", "rank_sweep")
    for rank in (2, 4, 100):
        inside = files_of(files.directory, rank)
        write_curves(inside, [row | {"cosine": 1 / row["epoch"]} for row in read_curves(inside.curves_csv)])
    for flags in (("--metric", "cosine"), ()):  # a rerun deletes the figure that it is not asked for
        done = run("rank_sweep_study.py", "--weight_path", "weight.pth", *QUICK, *flags)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("finished before") == 2
        assert files.figure("metric_cosine").exists() is bool(flags)
    assert {row["final_cosine"] for row in read_table(files.summary_csv)} == {repr(1 / 3)}
