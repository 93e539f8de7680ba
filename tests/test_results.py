import json
import math

import pytest

from ks import results

ROWS = [
    {"epoch": 1, "train_loss": 0.3, "val_loss": 0.1 + 0.2, "rank": 4, "lr": 1e-3, "epoch_seconds": 0.5},
    {"epoch": 2, "train_loss": 0.25, "val_loss": 0.35, "rank": 4, "lr": 5e-4, "epoch_seconds": 0.5},
]


def test_curves_survive_a_round_trip_to_the_bit(tmp_path):
    files = results.RunFiles(tmp_path, "p", 4)
    results.write_curves(files, ROWS, {"parameters": 12})
    assert results.read_curves(files.curves_csv) == ROWS
    stored = json.loads(files.curves_json.read_text())
    assert stored["val_losses"] == [0.1 + 0.2, 0.35]
    assert stored["parameters"] == 12


def test_no_file_holds_nan(tmp_path):
    files = results.RunFiles(tmp_path, "p", 4)
    results.write_curves(files, [ROWS[0] | {"train_loss": math.nan, "val_loss": math.inf}], {"nested": [math.nan]})
    assert "NaN" not in files.curves_json.read_text()
    assert json.loads(files.curves_json.read_text())["train_losses"] == [None]
    assert math.isnan(results.read_curves(files.curves_csv)[0]["train_loss"])


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.json"
    results.write_json(path, {"old": 1})

    def fail_half_way():
        with results.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_the_summary_skips_what_is_not_finite_and_invents_nothing():
    row = results.summarise(
        4, [*ROWS, ROWS[0] | {"epoch": 3, "train_loss": math.nan, "val_loss": math.nan}], "diverged"
    )
    assert (row["min_val_loss"], row["min_val_epoch"]) == (0.1 + 0.2, 1)
    assert (row["min_train_loss"], row["min_train_epoch"]) == (0.25, 2)
    assert row["final_val_loss"] is None
    empty = results.summarise(4, [], "failed")
    assert empty["final_val_loss"] is empty["min_train_epoch"] is None


def test_only_rank_folders_with_curves_are_found_in_order(tmp_path):
    for name in ("rank_16", "rank_2", "rank_x", "other"):
        (tmp_path / name).mkdir()
    for rank in (16, 2):
        results.write_curves(results.rank_files(tmp_path, rank), ROWS, {})
    (tmp_path / "rank_8").mkdir()
    assert list(results.find_curves(tmp_path)) == [2, 16]


def test_remove_takes_only_its_own_prefix(tmp_path):
    mine, other = results.RunFiles(tmp_path, "a", 4), results.RunFiles(tmp_path, "ab", 4)
    for files in (mine, other):
        results.write_curves(files, ROWS, {})
        files.epoch_checkpoint(3).touch()
    mine.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ab_epoch_3.pth",
        "ab_rank_4_loss_curves.csv",
        "ab_rank_4_loss_curves.json",
    ]


def test_unwritable_folders_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/below cannot be written"):
        results.prepare_output_dir(tmp_path / "file" / "below")
