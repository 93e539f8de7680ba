"""Files of inputs that are damaged, of another kind or dangerous: one line, exit code 2, nothing written.

tests/moments has the sums and samples that are readable and cannot be those of real inputs.
"""

import io
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import save_moments
from folders import GIB, QUICK, bomb, call, limit_memory, make_fifo, plan, refused
from safetensors.torch import save_file

import train_with_random
from ks.moments.moments_file import METADATA

pytestmark = pytest.mark.usefixtures("no_hang")
KEY = "layer.weight"
GENERATOR = torch.Generator().manual_seed(1)
ROWS, UNSEEN = torch.randn(300, 24, generator=GENERATOR), torch.randn(60, 24, generator=GENERATOR)


def metadata(text):
    return lambda path: save_file({"layer/sum_xx": torch.eye(24)}, path, {METADATA: text})


def holding(content):
    return lambda path: path.write_bytes(content)


def array(rows):
    return lambda path: np.save(path, rows)


def cut(path):
    save_moments(path, ROWS, UNSEEN)
    path.write_bytes(path.read_bytes()[:-1])


class Dangerous:
    def __reduce__(self):
        return exec, ("open('hacked', 'w').close()",)


def object_array(path):
    np.save(path, np.array([Dangerous()], dtype=object), allow_pickle=True)


def announced(*shape):
    """Make an array file that announces more than it holds."""
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return holding(file.getvalue() + bytes(960))


ALIASES = '{"version": 1, "aliases": {"layer.weight": "a\\u001b[31m\\n\\rb"}, "batches": {}, "created": "now"}'
REFUSED = {
    "another width": ("x.safetensors", lambda path: save_moments(path, ROWS[:, :16]), "are 16 wide"),
    "control characters": ("x.safetensors", metadata(ALIASES), "invalid metadata|the file lacks"),
    "metadata nested deep": ("x.safetensors", metadata("[" * 100_000), "invalid metadata"),
    "absent": ("x.safetensors", lambda path: None, "no such file"),
    "cut": ("x.safetensors", cut, "cannot be read"),
    "header of 2^60 bytes": ("x.safetensors", holding(b"\0" * 7 + b"\x10"), "cannot be read"),
    "a FIFO": ("x.safetensors", make_fifo, "no regular file"),
    "a FIFO of samples": ("x.npy", make_fifo, "no regular file"),
    "a directory": ("x.safetensors", lambda path: path.mkdir(), "is a directory"),
    "a long name": (f"{'a' * 300}.safetensors", lambda path: None, "cannot be read: File name too long"),
    "samples of another byte order": ("x.npy", array(ROWS.numpy().astype(">f4")), ""),
    "samples that overflow": ("x.npy", array(np.full((30, 24), 1e200)), "overflows"),
    "samples cut off": ("x.npy", announced(300, 24), "cannot be read"),
    "a petabyte of samples": ("x.npy", announced(10**13, 24), ""),
    "objects": ("x.npy", object_array, "cannot be read|Python objects"),
    "a pickle": ("x.pt", holding(pickle.dumps(Dangerous())), ""),
    "a pickle of samples": ("x.npy", holding(pickle.dumps(Dangerous())), ""),
    "meta samples": ("x.pt", lambda path: torch.save(ROWS.to("meta"), path), "is a meta tensor"),
    "a zip bomb": ("x.pt", lambda path: bomb(path, GIB // 4), ""),
}


@pytest.fixture
def weight(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({KEY: torch.randn(16, 24, generator=torch.Generator().manual_seed(0))}, path)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_holds_no_inputs_is_refused_in_one_line(tmp_path, capsys, monkeypatch, weight, case):
    name, make, message = REFUSED[case]
    make(tmp_path / name)
    limit_memory(monkeypatch, GIB // 8)
    monkeypatch.chdir(tmp_path)
    main, *arguments = plan(weight, "--inputs", tmp_path / name)
    line = refused(main, arguments, capsys, tmp_path)
    assert str(tmp_path / name) in line
    assert re.search(message, line), line
    assert not set(line) & set("\x1b\x07\r\n\0")


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


@pytest.mark.parametrize("flags", [["--inputs_key", "layer"], ["--fit_bias"], ["--inputs", ""]], ids=str)
def test_flags_without_a_file_are_one_line(tmp_path, capsys, weight, flags):
    arguments = ["--weight_path", weight, "--output_dir", tmp_path / "out", *QUICK, *flags]
    assert "--inputs" in refused(train_with_random.main, arguments, capsys, tmp_path)


READ = {
    "no held-out part": ("x.safetensors", lambda path: save_moments(path, ROWS)),
    "one input": ("x.safetensors", lambda path: save_moments(path, ROWS[:1], UNSEEN[:1])),
    "features first in memory": ("x.npy", array(np.asfortranarray(ROWS.numpy()))),
    "float16": ("x.npy", array(ROWS.half().numpy())),
    "a transposed view": ("x.pt", lambda path: torch.save(ROWS.t().contiguous().t(), path)),
    "tiny": ("x.npy", array(1e-30 * ROWS.double().numpy())),
    "huge": ("x.npy", array(1e30 * ROWS.double().numpy())),
}


@pytest.mark.parametrize("case", READ)
def test_unusual_inputs_are_trained_on(tmp_path, weight, case):
    name, make = READ[case]
    make(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    arguments = ["--weight_path", weight, "--inputs", tmp_path / name, "--output_dir", tmp_path / "out"]
    assert call(train_with_random.main, *arguments, *QUICK, "--quiet") == 0
    assert (tmp_path / name).read_bytes() == content
