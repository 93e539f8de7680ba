"""Files of inputs that are damaged, of another kind or dangerous: one line, exit code 2, nothing written."""

import io
import json
import pickle
import re
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, save_moments, sums_of
from folders import GIB, QUICK, call, limit_memory, make_fifo, plan, refused, snapshot
from safetensors.torch import save_file

import train_with_random
from ks.moments.moments_file import HELD_OUT, METADATA

pytestmark = pytest.mark.usefixtures("no_hang")
KEY = "layer.weight"
GENERATOR = torch.Generator().manual_seed(1)
ROWS, UNSEEN = torch.randn(300, 24, generator=GENERATOR), torch.randn(60, 24, generator=GENERATOR)


def moments(folder, **changes):
    """A moments file whose tensors are changed by functions, `held_sum_xx` for the held-out part's."""
    tensors: dict = {}
    for prefix, rows in (("", ROWS), (HELD_OUT, UNSEEN)):
        sums = sums_of(rows)
        values = {"sum_xx": sums.sum_xx, "sum_x": sums.sum_x, "count": torch.tensor(sums.count)}
        tensors |= {f"layer/{prefix}{name}": value for name, value in values.items()}
    record = {"version": 1, "aliases": {KEY: "layer"}, "batches": {"layer": 5}, "created": "now"}
    for name, change in changes.items():
        if name in record:
            record[name] = change
            continue
        place = f"layer/{HELD_OUT}{name.removeprefix('held_')}" if name.startswith("held_") else f"layer/{name}"
        value = change(tensors[place]) if change is not None else None
        tensors.pop(place)
        if value is not None:
            tensors[place] = value.contiguous()
    save_file(tensors, folder / "x.safetensors", {METADATA: json.dumps(record)})
    return folder / "x.safetensors"


def metadata(folder, text):
    save_file({"layer/sum_xx": torch.eye(24)}, folder / "x.safetensors", {METADATA: text})
    return folder / "x.safetensors"


def with_entry(row, col, value):
    def change(matrix):
        matrix = matrix.clone()
        matrix[row, col] = value
        return matrix

    return change


def written(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def good(folder):
    return save_moments(folder / "good.safetensors", ROWS, UNSEEN).read_bytes()


def array(folder, rows):
    np.save(folder / "x.npy", rows)
    return folder / "x.npy"


def torch_file(folder, content):
    with warnings.catch_warnings(action="ignore"):
        torch.save(content, folder / "x.pt")
    return folder / "x.pt"


def fifo(folder, name):
    make_fifo(folder / name)
    return folder / name


def directory(folder, name):
    (folder / name).mkdir()
    return folder / name


def zip_bomb(folder):
    """A file of torch whose storage is a GiB of zeros, deflated to a MiB."""
    torch.save(torch.zeros(4, 24), folder / "small.pt")
    with (
        zipfile.ZipFile(folder / "small.pt") as small,
        zipfile.ZipFile(folder / "x.pt", "w", zipfile.ZIP_DEFLATED) as large,
    ):
        for entry in small.infolist():
            content = small.read(entry)
            if entry.filename.endswith("/data/0"):
                with large.open(entry.filename, "w") as file:
                    for _ in range(256):
                        file.write(bytes(2**20))
            else:
                large.writestr(entry.filename, content)
    (folder / "small.pt").unlink()
    return folder / "x.pt"


class Dangerous:
    def __reduce__(self):
        return exec, ("open('hacked', 'w').close()",)


def pickled(folder, name):
    return written(folder, name, pickle.dumps(Dangerous()))


def object_array(folder):
    file = io.BytesIO()
    np.save(file, np.array([Dangerous()], dtype=object), allow_pickle=True)
    return written(folder, "x.npy", file.getvalue())


def huge_header(folder, shape):
    """An array file that announces more than it holds."""
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return written(folder, "x.npy", file.getvalue() + bytes(960))


NAN = float("nan")
REFUSED = {
    # Moments.
    "another width": (lambda folder: save_moments(folder / "x.safetensors", ROWS[:, :16]), "are 16 wide"),
    "NaN in sum_xx": (lambda folder: moments(folder, sum_xx=with_entry(1, 2, NAN)), "NaN or infinite"),
    "NaN in sum_x": (lambda folder: moments(folder, sum_x=lambda x: x * NAN), "NaN or infinite"),
    "not symmetric": (lambda folder: moments(folder, sum_xx=with_entry(1, 2, 9e9)), "not symmetric"),
    "not PSD": (lambda folder: moments(folder, sum_xx=lambda x: x - 400 * torch.eye(24)), "not positive semi"),
    "a mean of others": (lambda folder: moments(folder, sum_x=lambda x: x + 1e4), "sum_x does not belong"),
    "all zero": (lambda folder: moments(folder, sum_xx=lambda x: 0 * x, sum_x=lambda x: 0 * x), "all inputs are zero"),
    "overflow": (lambda folder: moments(folder, sum_xx=lambda x: x * 1e307), "NaN or inf|overflows"),
    "count 0": (lambda folder: moments(folder, count=lambda x: 0 * x), "count is 0"),
    "count a fraction": (lambda folder: moments(folder, count=lambda x: x / 7), "count must be"),
    "sum_xx not square": (lambda folder: moments(folder, sum_xx=lambda x: x[:5]), "a square one is needed"),
    "sum_x too short": (lambda folder: moments(folder, sum_x=lambda x: x[:5]), r"\(24,\) is needed"),
    "sums missing": (lambda folder: moments(folder, sum_xx=None, sum_x=None, count=None), "the file lacks"),
    "held out wider": (
        lambda folder: moments(folder, held_sum_xx=lambda x: torch.eye(30), held_sum_x=lambda x: torch.zeros(30)),
        "held-out part is 30 wide",
    ),
    "no alias": (lambda folder: moments(folder, aliases={"other.weight": "layer"}), "no inputs for key 'layer.weight'"),
    "no aliases": (lambda folder: moments(folder, aliases={}), "invalid metadata"),
    "an alias to nothing": (lambda folder: moments(folder, aliases={KEY: "absent"}), "the file lacks"),
    "control characters": (lambda folder: moments(folder, aliases={KEY: "a\x1b[31m\n\rb"}), "the file lacks"),
    "a newer version": (lambda folder: moments(folder, version=9), "version 9"),
    "metadata nested deep": (lambda folder: metadata(folder, "[" * 100_000), "invalid metadata"),
    # Files.
    "absent": (lambda folder: folder / "absent.safetensors", "no such file"),
    "empty": (lambda folder: written(folder, "x.safetensors", b""), "cannot be read"),
    "cut": (lambda folder: written(folder, "x.safetensors", good(folder)[:-1]), "cannot be read"),
    "header of 2^60 bytes": (lambda folder: written(folder, "x.safetensors", b"\0" * 7 + b"\x10"), "cannot be read"),
    "another suffix": (lambda folder: written(folder, "x.csv", b"1,2\n"), "suffix '.csv'"),
    "a FIFO": (lambda folder: fifo(folder, "x.safetensors"), "not a regular file"),
    "a FIFO of samples": (lambda folder: fifo(folder, "x.npy"), "no regular file"),
    "a directory": (lambda folder: directory(folder, "x.safetensors"), "not a regular file|directory"),
    "a long name": (lambda folder: folder / f"{'a' * 300}.safetensors", "cannot be read: File name too long"),
    # Samples.
    "samples of another width": (lambda folder: array(folder, ROWS[:, :16].numpy()), "width 16"),
    "samples with NaN": (lambda folder: array(folder, np.full((30, 24), np.nan, "f4")), "NaN or infinite"),
    "samples of another byte order": (lambda folder: array(folder, ROWS.numpy().astype(">f4")), ""),
    "no samples": (lambda folder: array(folder, np.ones((0, 24), "f4")), r"shape \(0, 24\)"),
    "samples that are all zero": (lambda folder: array(folder, np.zeros((30, 24), "f4")), "all inputs are zero"),
    "samples that overflow": (lambda folder: array(folder, np.full((30, 24), 1e200)), "overflows"),
    "samples cut off": (lambda folder: huge_header(folder, (300, 24)), "cannot be read"),
    "a petabyte of samples": (lambda folder: huge_header(folder, (10**13, 24)), ""),
    "objects": (object_array, "cannot be read|Python objects"),
    "a pickle": (lambda folder: pickled(folder, "x.pt"), ""),
    "a pickle of samples": (lambda folder: pickled(folder, "x.npy"), ""),
    "several tensors": (lambda folder: torch_file(folder, {"a": ROWS, "b": ROWS}), "2 tensors"),
    "sparse samples": (lambda folder: torch_file(folder, ROWS.to_sparse()), "is sparse"),
    "meta samples": (lambda folder: torch_file(folder, ROWS.to("meta")), "is a meta tensor"),
    "a zip bomb": (zip_bomb, ""),
}


@pytest.fixture
def weight(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({KEY: torch.randn(16, 24, generator=torch.Generator().manual_seed(0))}, path)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_holds_no_inputs_is_refused_in_one_line(tmp_path, capsys, monkeypatch, weight, case):
    make, message = REFUSED[case]
    path = make(tmp_path)
    limit_memory(monkeypatch, GIB // 8)
    monkeypatch.chdir(tmp_path)
    arguments = ["--weight_path", weight, "--inputs", path, "--output_dir", tmp_path / "out", *QUICK]
    for main, given in ((train_with_random.main, arguments), (plan(weight)[0], plan(weight, "--inputs", path)[1:])):
        line = refused(main, given, capsys, tmp_path)
        assert str(path) in line
        assert re.search(message, line), line
        assert not set(line) & set("\x1b\x07\r\n\0")


@pytest.mark.parametrize("case", ["a FIFO", "a pickle"])
def test_a_process_says_so_too(tmp_path, weight, case):
    path = REFUSED[case][0](tmp_path)
    before = snapshot(tmp_path)
    command = [sys.executable, ROOT / "train_with_random.py", "--weight_path", weight, "--inputs", path, *QUICK]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr
    assert snapshot(tmp_path) == before


FLAGS = {
    "two spreads": (["--input_std", "2"], "--input_std 2 together with --inputs"),
    "fixed moments": (["--sampling", "fixed"], "--sampling fixed needs raw samples"),
    "another key": (["--inputs_key", "nothing\x1b[0m"], "no inputs for key"),
    "an empty key": (["--inputs_key", ""], "argument --inputs_key: a key must not be empty; leave the flag out"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_do_not_go_together_are_one_line(tmp_path, capsys, weight, case):
    flags, message = FLAGS[case]
    path = save_moments(tmp_path / "x.safetensors", ROWS, UNSEEN, KEY)
    arguments = ["--weight_path", weight, "--output_dir", tmp_path / "out", *QUICK, "--inputs", path, *flags]
    assert message in refused(train_with_random.main, arguments, capsys, tmp_path)
    assert message in refused(plan(weight)[0], [*plan(weight, "--inputs", path)[1:], *flags], capsys, tmp_path)


@pytest.mark.parametrize("flags", [["--inputs_key", "layer"], ["--fit_bias"], ["--inputs", ""]], ids=str)
def test_flags_without_a_file_are_one_line(tmp_path, capsys, weight, flags):
    arguments = ["--weight_path", weight, "--output_dir", tmp_path / "out", *QUICK, *flags]
    assert "--inputs" in refused(train_with_random.main, arguments, capsys, tmp_path)


READ = {
    "no held-out part": lambda folder: save_moments(folder / "x.safetensors", ROWS),
    "held out count 0": lambda folder: moments(folder, held_count=lambda x: 0 * x),
    "float32 sums": lambda folder: moments(folder, sum_xx=lambda x: x.float(), sum_x=lambda x: x.float()),
    "fewer inputs than features": lambda folder: save_moments(folder / "x.safetensors", ROWS[:7], UNSEEN),
    "one input": lambda folder: save_moments(folder / "x.safetensors", ROWS[:1], UNSEEN[:1]),
    "features first in memory": lambda folder: array(folder, np.asfortranarray(ROWS.numpy())),
    "float16": lambda folder: array(folder, ROWS.half().numpy()),
    "a transposed view": lambda folder: torch_file(folder, ROWS.t().contiguous().t()),
    "tiny": lambda folder: array(folder, 1e-30 * ROWS.double().numpy()),
    "huge": lambda folder: array(folder, 1e30 * ROWS.double().numpy()),
}


@pytest.mark.parametrize("case", READ)
def test_unusual_inputs_are_trained_on(tmp_path, weight, case):
    path = READ[case](tmp_path)
    content = path.read_bytes()
    arguments = ["--weight_path", weight, "--inputs", path, "--output_dir", tmp_path / "out", *QUICK, "--quiet"]
    assert call(train_with_random.main, *arguments) == 0
    assert path.read_bytes() == content
