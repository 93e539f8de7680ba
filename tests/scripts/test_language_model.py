"""The study of a language model on its tiny stand-in: every cell, the picture; a rerun measures nothing again."""

from conftest import read_table


def test_all_cells_are_measured_once_and_kept(run, tmp_path):
    command = ("benchmarks/language_model.py", "--tiny", "--csv", "cells.csv", "--work_dir", "work")
    done = run(*command, "--minutes", 0)
    assert done.returncode == 0, done.stderr
    assert "the time is over" in done.stderr
    assert [row["method"] for row in read_table(tmp_path / "cells.csv")] == ["dense"]
    done = run(*command, "--figure", "cells.png")
    assert done.returncode == 0, done.stderr
    rows = read_table(tmp_path / "cells.csv")
    assert len(rows) == 1 + 4 * 3 * 2 + 2
    assert len({(row["method"], row["budget"], row["allocation"]) for row in rows}) == len(rows)
    for row in rows[1:]:
        assert float(row["share"]) <= float(row["budget"])
        assert float(row["perplexity"]) > 1
    losses = {(row["method"], row["budget"], row["allocation"]): float(row["relative_loss"]) for row in rows[1:]}
    for (method, budget, allocation), loss in losses.items():
        assert allocation != "by the plan" or loss <= losses[method, budget, "uniform"]
    assert (tmp_path / "cells.png").stat().st_size < 60_000
    before = (tmp_path / "cells.csv").read_bytes()
    assert run(*command).returncode == 0
    assert (tmp_path / "cells.csv").read_bytes() == before
