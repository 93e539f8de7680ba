"""Test weights, generated as users do it."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from warm import FileSizeLimit

from ks.files.weights import load_weight


def test_the_generator_prints_statistics_and_protects_what_is_there(run, tmp_path):
    arguments = ("--output_features", 8, "--input_features", 12, "--output_path", "w.pth")
    for _ in range(2):  # the same weight again is no other one
        done = run("generate_test_weight.py", *arguments, "--dtype", "float16", "--init_method", "kaiming_normal")
        assert done.returncode == 0, done.stderr
    assert "Frobenius norm" in done.stdout
    assert load_weight(tmp_path / "w.pth").tensor.dtype == torch.float16
    other = run("generate_test_weight.py", *arguments)
    assert other.returncode == 2
    assert "--overwrite" in other.stderr
    assert load_weight(tmp_path / "w.pth").tensor.dtype == torch.float16
    assert run("generate_test_weight.py", *arguments, "--overwrite").returncode == 0


@pytest.mark.usefixtures("cold")
def test_without_flags_the_weight_has_the_documented_size(run, tmp_path):
    done = run("generate_test_weight.py")
    assert done.returncode == 0, done.stderr
    assert load_weight(tmp_path / "test_weight.pth").tensor.shape == (2048, 4096)


@pytest.mark.parametrize(("suffix", "room"), [(".pth", 0), (".npy", 1000), (".safetensors", 1000)])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, suffix, room):
    arguments = ("--output_features", "64", "--input_features", "64", "--output_path", f"w{suffix}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "generate_test_weight.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=FileSizeLimit(room),
    )
    assert done.returncode == 2
    assert done.stderr == f"generate_test_weight.py: error: w{suffix} cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == []
