"""The study of a language model on its tiny stand-in: every cell, the picture; a rerun measures nothing again."""

from conftest import read_table

KEY = ("metric", "family", "budget", "allocation", "treatment")


def test_all_cells_are_measured_once_and_kept(run, tmp_path):
    command = ("benchmarks/language_model.py", "--tiny", "--csv", "cells.csv", "--work_dir", "work")
    done = run(*command, "--minutes", 0)
    assert done.returncode == 0, done.stderr
    assert "the time is over" in done.stderr
    assert [row["family"] for row in read_table(tmp_path / "cells.csv")] == ["dense"]
    done = run(*command, "--figure", "cells.png", timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {tuple(row[name] for name in KEY): row for row in read_table(tmp_path / "cells.csv")}
    assert len(rows) == 1 + 2 * 3 * 2 + 2 * 2 + 2 * 2 * 2
    for (metric, family, budget, allocation, treatment), row in rows.items():
        assert float(row["parameters"]) <= float(budget) * 6912
        assert len(row["docstrings_losses"].split()) == 512 // 64
        minimised = "predicted_increase" if metric == "model_loss" else "energy_loss"
        if allocation == "planned":
            twin = rows[metric, family, budget, "equal fractions", treatment]
            assert float(row[minimised]) <= float(twin[minimised])
    assert "planned − equal, descriptions" in done.stdout
    assert (tmp_path / "cells.png").stat().st_size < 60_000
    before = (tmp_path / "cells.csv").read_bytes()
    assert run(*command).returncode == 0
    assert (tmp_path / "cells.csv").read_bytes() == before
