import json
import math

import pytest

from ks.errors import UsageError
from ks.files import columns, curves
from ks.files.curves import CurvesTail, curves_if_any, long_form, read_curves, write_curves
from ks.files.layout import RunFiles

ROWS = [
    {"epoch": 1, "train_loss": 0.3, "val_loss": 0.1 + 0.2, "rank": 4, "population_loss": 0.5, "lr": 1e-3},
    {"epoch": 2, "train_loss": 0.25, "val_loss": 0.35, "rank": 4, "population_loss": 0.25, "lr": 5e-4},
]
ROWS = [row | {"epoch_seconds": 0.5, "segment": 1} for row in ROWS]


def test_curves_survive_a_round_trip_to_the_bit(tmp_path):
    files = RunFiles(tmp_path, "p", 4)
    write_curves(files, ROWS)
    assert read_curves(files.curves_csv) == ROWS
    stored = json.loads(files.curves_json.read_text())
    assert stored["val_losses"] == [0.1 + 0.2, 0.35]


def test_no_file_holds_nan(tmp_path):
    files = RunFiles(tmp_path, "p", 4)
    write_curves(files, [ROWS[0] | {"train_loss": math.nan, "val_loss": math.inf}])
    assert "NaN" not in files.curves_json.read_text()
    assert json.loads(files.curves_json.read_text())["train_losses"] == [None]
    assert math.isnan(read_curves(files.curves_csv)[0]["train_loss"])


def test_metrics_are_further_columns_in_the_order_of_their_first_appearance(tmp_path):
    files = RunFiles(tmp_path, "p", 4)
    rows = [ROWS[0] | {"r2": 0.5}, ROWS[1] | {"a.b-c": None, "r2": math.inf}]
    write_curves(files, rows)
    assert files.curves_csv.read_text().splitlines()[0].endswith(",segment,r2,a.b-c")
    stored = json.loads(files.curves_json.read_text())
    assert (stored["r2"], stored["a.b-c"]) == ([0.5, None], [None, None])
    first, second = read_curves(files.curves_csv)
    assert first["r2"] == 0.5
    assert all(map(math.isnan, (first["a.b-c"], second["a.b-c"], second["r2"])))


@pytest.mark.parametrize("measured", [False, True])
def test_header_and_keys_are_the_declared_columns(tmp_path, measured):
    """The gradient norm has a column only if it was measured."""
    files = RunFiles(tmp_path, "p", 4)
    write_curves(files, [row | ({"grad_norm": 1.0} if measured else {}) for row in ROWS])
    declared = [column for column in columns.CURVES if measured or column.name != "grad_norm"]
    assert files.curves_csv.read_text().splitlines()[0].split(",") == columns.names(declared)
    keys = ["rank", *(column.plural for column in declared if column.name != "rank")]
    assert list(json.loads(files.curves_json.read_text())) == keys


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"epoch,train_loss\n1,2\n", "lacks the columns val_loss, rank"),
        (b"epoch,train_loss,val_loss,rank\n1,0.5,0.5,2\n2,zwei,0.5,2\n", "line 3: Expected .float.*train_loss"),
        (b"epoch,train_loss,val_loss,rank\n1,0.5,0.5\n", "line 2"),
        (b"epoch,train_loss,val_loss,rank\n,0.5,0.5,2\n", "line 2"),
        (b"epoch,train_loss,val_loss,rank\ninf,0.5,0.5,2\n", "line 2"),
        (b"epoch,train_loss,val_loss,rank,r2\n1,0.5,0.5,2,0.5\n2,0.5,0.5,2,good\n", "line 3: Expected .float.*r2"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_what_holds_no_curves_is_one_line(tmp_path, content, message):
    path = tmp_path / "c.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        read_curves(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    assert curves_if_any(path) == []


def test_the_long_form_has_a_row_for_each_loss_there_is_and_metrics_beside_the_validation_loss():
    rows = long_form(4, 7, [ROWS[0] | {"population_loss": math.nan}, ROWS[1] | {"r2": 0.5}])
    assert [(row["epoch"], row["split"], row["loss"]) for row in rows] == [
        (1, "train", 0.3),
        (1, "validation", 0.1 + 0.2),
        (2, "train", 0.25),
        (2, "validation", 0.35),
        (2, "population", 0.25),
    ]
    assert {(row["rank"], row["seed"]) for row in rows} == {(4, 7)}
    assert set(rows[0]) == set(columns.names(columns.ALL_CURVES))
    assert [row.get("r2") for row in rows if row["split"] == "validation"] == [None, 0.5]
    assert not [row for row in rows if row["split"] != "validation" and "r2" in row]


def test_columns_that_no_metric_can_be_are_left_out(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("epoch,train_loss,val_loss,rank,,my note,split,r2\n1,0.5,0.5,2,7,good,good,0.25\n")
    assert read_curves(path) == [{"epoch": 1, "train_loss": 0.5, "val_loss": 0.5, "rank": 2, "r2": 0.25}]


def test_a_tail_follows_the_file_and_reads_it_only_when_it_has_changed(tmp_path, monkeypatch):
    files = RunFiles(tmp_path, "p", 4)
    tail = CurvesTail(files.curves_csv)
    tail.update()
    assert (tail.epochs, tail.val_loss, tail.population_loss) == (0, None, None)
    read, read_text = [], curves.curves_if_any
    monkeypatch.setattr(curves, "curves_if_any", lambda path: read.append(path) or read_text(path))
    for epochs in (1, 2, 2):
        if epochs != tail.epochs:
            write_curves(files, [ROWS[0], ROWS[1] | {"population_loss": math.nan}][:epochs])
        tail.update()
        assert tail.epochs == epochs
    assert (tail.val_loss, tail.population_loss, len(read)) == (ROWS[1]["val_loss"], ROWS[0]["population_loss"], 2)
    files.curves_csv.write_bytes(b"neither a header\nnor a \xff number")
    tail.update()
    files.curves_csv.unlink()
    tail.update()
    assert (tail.epochs, tail.val_loss) == (2, ROWS[1]["val_loss"])
