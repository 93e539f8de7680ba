import dataclasses

import torch
from study_rows import CHAIN, CURVES, make_row

import ks
from ks.bounds.floors import loss_floor
from ks.files import columns
from ks.files.atomic import read_json, write_json
from ks.files.status import Ending, Status
from ks.report.summary import Reference, rank_row, run_row
from ks.report.summary_table import summary_table


def printed(rows):
    """Return the header line of the printed summary, and its other lines."""
    header, *lines = summary_table(rows).splitlines()
    return header, lines


def test_the_printed_summary_has_the_declared_headers_in_their_order():
    """A floor with two bounds, measured inputs and a known duration, so that no column is left out."""
    curves = [CURVES[1]]
    runs = [run_row(2, curves, train_seconds=1.25)]
    floor = loss_floor(torch.randn(16, 24), ks.make_chain(16, 24, "butterfly"), [2])[0]
    measured = Reference(1.0, held_out_predict_zero_loss=1.1, held_out_count=100, isotropic_floors=torch.ones(9))
    row = rank_row(runs, CHAIN, dataclasses.replace(floor, exact=False), measured)
    declared = {column.name: column for column in columns.SUMMARY}
    header, (line,) = printed([row])
    place = 0
    for name in columns.PRINTED:
        place = header.index(declared[name].header, place) + len(declared[name].header)
        assert declared[name].form.format(row[name]) in line
    assert header[place:].strip() == ""


def test_headers_and_forms_come_from_the_declarations(monkeypatch):
    changed = tuple(
        dataclasses.replace(column, header="RMV", form="{:.5f}!") if column.name == "removed_share" else column
        for column in columns.SUMMARY
    )
    monkeypatch.setattr(columns, "SUMMARY", changed)
    header, (line,) = printed([make_row()])
    assert "RMV" in header.split()
    assert "0.92500!" in line.split()


def test_the_share_removed_is_printed():
    header, (line,) = printed([make_row(population=0.26, lower=0.2)])
    assert "removed" in header.split()
    assert "92.50%" in line.split()


def test_columns_that_say_nothing_are_left_out():
    header, _ = printed([make_row()])
    assert "best known" not in header
    assert "seconds" not in header
    header, lines = printed([make_row(upper=0.22), make_row(ending=Ending(Status.FAILED, "exit 1"))])
    assert "best known" in header
    assert "failed (exit 1)" in lines[1]
    assert "-" in lines[1].split()
    header, _ = printed([rank_row([run_row(1, CURVES)], CHAIN)])
    assert "verdict" not in header


def test_a_summary_read_from_its_file_is_printed_as_the_one_in_memory(tmp_path):
    rows = [make_row(), make_row(rank=4), make_row(ending=Ending(Status.DIVERGED))]
    names = columns.names(columns.SUMMARY)
    write_json(tmp_path / "s.json", [{name: row.get(name) for name in names} for row in rows])
    assert summary_table(read_json(tmp_path / "s.json")) == summary_table(rows)
