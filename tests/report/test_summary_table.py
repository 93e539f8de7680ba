import dataclasses
import itertools
import re

import torch
from study_rows import CHAIN, CURVES, make_row

import ks
from ks.bounds.floors import loss_floor
from ks.files import columns
from ks.files.atomic import read_json, write_json
from ks.files.status import Ending, Status
from ks.report.summary import Reference, rank_row, run_row
from ks.report.summary_table import summary_table


def names_in(text):
    """Return the names of the columns of the tables in a text, put together again from their two lines."""
    names = []
    for block in text.split("\n\n"):
        header = list(itertools.takewhile(lambda line: not line.split()[0].isdigit(), block.splitlines()))
        upper, lower = [*([""] * (2 - len(header))), *header]
        for match in re.finditer(r"\S+", lower):
            above = [part for part in re.finditer(r"\S+", upper) if part.end() == match.end()]
            names.append("".join(part.group() for part in above) + match.group())
    return names


def test_metrics_are_among_the_details():
    row = make_row() | {"final_cosine": 0.123456, "best_cosine": 0.5}
    assert "0.1235" in summary_table([row], verbose=True)
    assert "cosine" not in summary_table([row])


def whole_row():
    """A row with two bounds, measured inputs, several seeds and a known duration, so that no column is left out."""
    curves = [[CURVES[1] | {"population_loss": loss}] for loss in (0.26, 0.36)]
    runs = [run_row(2, rows, seed=seed, train_seconds=1.25) for seed, rows in enumerate(curves)]
    floor = loss_floor(torch.randn(16, 24), ks.make_chain(16, 24, "butterfly"), [2])[0]
    measured = Reference(1.0, held_out_predict_zero_loss=1.1, held_out_count=100, isotropic_floors=torch.ones(9))
    return rank_row(runs, CHAIN, dataclasses.replace(floor, exact=False), measured) | {"status": "ok (copy of rank 1)"}


def test_the_printed_summary_has_the_names_of_the_files_in_their_order():
    row = whole_row()
    text = summary_table([row])
    assert [name for name in names_in(text) if name != "rank"] == [*columns.PRINTED[1:]]
    detailed = summary_table([row], verbose=True)
    assert detailed.startswith(text)
    assert [name for name in names_in(detailed) if name != "rank"] == [
        *columns.PRINTED[1:],
        *columns.DETAILS,
    ]
    declared = {column.name: column for column in columns.SUMMARY}
    for name in (*columns.PRINTED, *columns.DETAILS):
        assert {*declared[name].form.format(row[name]).split()} <= {*detailed.split()}


def test_no_line_is_wider_than_a_terminal():
    marks = "between its bounds, larger than dense, better than the best known chain, calibration-limited"
    text = summary_table([whole_row() | {"verdict": marks}], verbose=True)
    assert max(map(len, text.splitlines())) <= 100
    assert {*marks.split()} <= {*text.split()}


def test_the_spread_over_seeds_is_printed():
    assert "relative_loss_se" in names_in(summary_table([whole_row()]))
    assert "relative_loss_se" not in names_in(summary_table([make_row()]))


def test_forms_come_from_the_declarations(monkeypatch):
    changed = tuple(
        dataclasses.replace(column, form="{:.5f}!") if column.name == "relative_loss" else column
        for column in columns.SUMMARY
    )
    monkeypatch.setattr(columns, "SUMMARY", changed)
    assert "0.26000!" in summary_table([make_row()])


def test_columns_that_say_nothing_are_left_out():
    names = names_in(summary_table([make_row()], verbose=True))
    assert not {"relative_floor_upper", "loss_floor_upper", "train_seconds", "status"} & {*names}
    text = summary_table([make_row(upper=0.22), make_row(ending=Ending(Status.FAILED, "exit 1"))])
    assert {"relative_floor_upper", "status"} <= {*names_in(text)}
    assert "failed (exit 1)" in text
    assert "-" in text.splitlines()[3].split()
    assert "verdict" not in names_in(summary_table([rank_row([run_row(1, CURVES)], CHAIN)]))


def test_without_a_relative_loss_the_final_losses_are_printed():
    names = names_in(summary_table([rank_row([run_row(1, CURVES)])]))
    assert names == ["rank", "final_val_loss", "final_train_loss"]


def test_a_summary_read_from_its_file_is_printed_as_the_one_in_memory(tmp_path):
    rows = [make_row(), make_row(rank=4), make_row(ending=Ending(Status.DIVERGED))]
    names = columns.names(columns.SUMMARY)
    write_json(tmp_path / "s.json", [{name: row.get(name) for name in names} for row in rows])
    assert summary_table(read_json(tmp_path / "s.json")) == summary_table(rows)
