"""One line means one line, and text from a user is text: in messages, figures and spreadsheets."""

import csv

import pytest
import torch
from folders import call

import plot_rank_results
import rank_sweep_study
import train_with_random
from ks.errors import one_line
from ks.files.atomic import write_csv
from ks.files.layout import FIGURES

SWEEP = ("--num_samples", "80", "--batch_size", "16", "--num_epochs", "1", "--quiet", "--ranks", "2", "--jobs", "1")


PATHS = ("a\r\nb.pth", "a\x1b[31mred.pth", "a\u2028b.pth", "a\x00b.pth", "a\u202eb.pth")


@pytest.mark.parametrize("flags", [*(("--weight_path", path) for path in PATHS), ("--rank", "x\n\x1b[2Jy")], ids=ascii)
def test_a_value_with_control_characters_is_one_line(capsys, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    assert call(train_with_random.main, "--weight_path", "w.pth", *flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.rstrip("\n").isprintable()


@pytest.mark.parametrize("key", [r"$\frac$", "a\n\x1b[31m", "-dash"])
def test_a_key_of_any_text_gives_figures(tmp_path, monkeypatch, key, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({key: torch.randn(16, 24), "other": torch.randn(2, 2)}, "weight.pth")
    assert rank_sweep_study.main(["--weight_path", "weight.pth", f"--weight_key={key}", *SWEEP]) == 0
    assert len(list((tmp_path / "rank_sweep_results").glob("*.png"))) == len(FIGURES)


def test_a_title_of_any_text_is_drawn_as_it_is(swept, tmp_path):
    title = r"$\frac$ \notacommand, 5 $"
    figures = ["--results_dir", str(swept[0] / "rank_sweep_results"), "--output_dir", str(tmp_path / "figures")]
    assert plot_rank_results.main([*figures, "--title", title, "--formats", "svg"]) == 0
    assert f"<!-- {title} -->" in (tmp_path / "figures" / "rank_sweep_final_losses.svg").read_text()


@pytest.mark.parametrize("text", ["=1+1", "-1+1", "@SUM(A1)", "\t=x"])
def test_a_formula_in_a_cell_is_quoted(tmp_path, text):
    write_csv(tmp_path / "table.csv", ["status", "loss"], [{"status": text, "loss": -1.5}])
    with open(tmp_path / "table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"status": f"'{text.strip()}", "loss": "-1.5"}


def test_one_line_keeps_ordinary_text():
    text = "Ein Gewicht „ö“ × 3·10⁻² ≤ 日本語"
    assert one_line(text) == text
    assert len(one_line("x" * 10_000)) <= 2001
