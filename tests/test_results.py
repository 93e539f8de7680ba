import json
import math

import pytest

from ks import results

ROWS = [
    {
        "epoch": 1,
        "train_loss": 0.3,
        "val_loss": 0.1 + 0.2,
        "rank": 4,
        "population_loss": 0.5,
        "lr": 1e-3,
        "epoch_seconds": 0.5,
    },
    {
        "epoch": 2,
        "train_loss": 0.25,
        "val_loss": 0.35,
        "rank": 4,
        "population_loss": 0.25,
        "lr": 5e-4,
        "epoch_seconds": 0.5,
    },
]


def test_curves_survive_a_round_trip_to_the_bit(tmp_path):
    files = results.RunFiles(tmp_path, "p", 4)
    results.write_curves(files, ROWS)
    assert results.read_curves(files.curves_csv) == ROWS
    stored = json.loads(files.curves_json.read_text())
    assert stored["val_losses"] == [0.1 + 0.2, 0.35]


def test_no_file_holds_nan(tmp_path):
    files = results.RunFiles(tmp_path, "p", 4)
    results.write_curves(files, [ROWS[0] | {"train_loss": math.nan, "val_loss": math.inf}])
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


def test_only_rank_folders_with_curves_are_found_in_order(tmp_path):
    for name in ("rank_16", "rank_2", "rank_8", "rank_x", "other", "rank_2/seed_x"):
        (tmp_path / name).mkdir()
    for rank, seed in ((16, None), (2, None), (2, 10), (2, 9)):
        files = results.rank_files(tmp_path, rank, seed)
        files.directory.mkdir(exist_ok=True)
        results.write_curves(files, ROWS)
    assert list(results.find_curves(tmp_path)) == [(2, None), (2, 9), (2, 10), (16, None)]


def test_remove_takes_only_its_own_prefix(tmp_path):
    mine, other = results.RunFiles(tmp_path, "a", 4), results.RunFiles(tmp_path, "ab", 4)
    for files in (mine, other):
        results.write_curves(files, ROWS)
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
