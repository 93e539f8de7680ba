import json
import math
import os

import pytest

from ks.errors import UsageError
from ks.files.atomic import (
    atomic_path,
    finite,
    prepare_output_dir,
    read_json,
    read_json_object,
    write_csv,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail_half_way():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_an_unwritable_folder_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file/below cannot be written"):
        prepare_output_dir(tmp_path / "file" / "below")


def test_nan_and_infinity_become_none_at_any_depth():
    value = {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf}, "d": "nan", "e": 3}
    assert finite(value) == {"a": [1.5, None, [None]], "b": {"c": None}, "d": "nan", "e": 3}


def test_a_csv_file_has_the_columns_asked_for_and_empty_cells_for_what_is_unknown(tmp_path):
    write_csv(tmp_path / "t.csv", iter(["a", "b", "c"]), [{"a": 1, "b": math.nan, "more": 2}, {"b": None, "c": "x"}])
    assert (tmp_path / "t.csv").read_text() == "a,b,c\n1,,\n,,x\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b'{"a": 1}', {"a": 1}), (b"[1]", [1]), (b'{"a": ', None), (b"[" * 100_000, None), (b"\xff\xfe", None)],
)
def test_broken_json_is_nothing(tmp_path, content, expected):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == expected
    assert read_json_object(tmp_path / "a.json") == (expected if isinstance(expected, dict) else {})


def test_a_fifo_and_an_absent_file_are_nothing_in_json(tmp_path, no_hang):
    os.mkfifo(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") is read_json(tmp_path / "absent.json") is None
