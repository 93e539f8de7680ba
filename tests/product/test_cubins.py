"""The kernels as machine code for five generations of GPUs, compiled without one. `make test-cubins` has all of it."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from ks.product import tiles

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

INSTRUCTION = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC", 120: "HMMA"}


def compiled(*arguments) -> list[dict]:
    program = ROOT / "benchmarks" / "compile_kernels.py"
    command = [sys.executable, program, "--format", "json", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=580).stdout)


def few():
    half = compiled("--dtypes", "bfloat16", "--ranks", 16, "--batches", 32, 25088)
    return half + compiled("--dtypes", "float32", "--ranks", 4, "--batches", 32, "--archs", 89, 90, 120)


def many():
    ranks = ("--ranks", 4, 16, 32, 64, "--batches", 32, 1024, 25088)
    return compiled(*ranks) + compiled("--chain", "butterfly", "--dtypes", "bfloat16", "float32", "--batches", 32, 1024)


@pytest.fixture(scope="module", params=[few, pytest.param(many, marks=pytest.mark.cubins)], ids=["few", "many"])
def rows(request):
    return request.param()


def test_every_kernel_is_there_for_every_architecture(rows):
    for arch in INSTRUCTION:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert kernels >= {"factor_kernel", "values_gradient_kernel"}


def test_no_kernel_uses_local_memory(rows):
    assert not [row for row in rows if row["local_memory"]]


def test_every_kernel_fits_a_multiprocessor(rows):
    for row in rows:
        assert row["programs"] >= 1, row
        assert row["shared_bytes"] <= tiles.SHARED_KIB.get(row["arch"], 99) * 1024, row


def test_no_load_of_half_precision_is_narrower_than_8_bytes(rows):
    for row in rows:
        widths = {int(width) for width in row["global_load_bytes"]}
        assert widths <= ({16} if row["dtype"] == "float32" else {8, 16}), row


def test_half_precision_runs_on_the_tensor_cores_of_its_generation(rows):
    for row in rows:
        if row["dtype"] == "float32":
            assert not row["instructions"], "IEEE float32 must not be rounded by tensor cores"
            continue
        assert all(name.startswith(INSTRUCTION[row["arch"]]) for name in row["instructions"]), row
        assert sum(row["instructions"].values()) > 0, row
        for name in row["instructions"]:
            if row["arch"] == 90:
                assert int(name.split("x")[1]) >= 32, "columns of a wgmma"


def test_tf32_uses_tensor_cores_only_when_asked_for():
    for row in compiled("--dtypes", "float32", "--ranks", 4, "--batches", 1024, "--archs", 80, "--precision", "tf32"):
        assert any(name.startswith("HMMA") for name in row["instructions"]), row
