"""The kernels of the study's usual patterns as machine code for three generations of cards, compiled without one."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compiled(*arguments) -> list[dict]:
    program = ROOT / "benchmarks" / "compile_kernels.py"
    command = [sys.executable, program, "--format", "json", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout)


@pytest.fixture(scope="module")
def rows():
    return [
        *compiled("--dtypes", "float16", "bfloat16", "--ranks", 16, 64, "--batches", 25088),
        *compiled("--dtypes", "float32", "--ranks", 16, "--batches", 32),
    ]


def test_every_kernel_is_there_for_every_architecture(rows):
    for arch in INSTRUCTION:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert kernels >= {"factor_kernel", "values_gradient_kernel"}


def test_nothing_spills(rows):
    assert not [row for row in rows if row["spilled_bytes"]]


def test_half_precision_runs_on_the_tensor_cores_of_its_generation(rows):
    for row in rows:
        if row["dtype"] == "float32":
            assert not row["instructions"], "IEEE float32 must not be rounded by tensor cores"
        else:
            assert row["instructions"].get(INSTRUCTION[row["arch"]], 0) > 0, row


def test_tf32_uses_tensor_cores_only_when_asked_for():
    for row in compiled("--dtypes", "float32", "--ranks", 16, "--batches", 25088, "--archs", 80, "--precision", "tf32"):
        assert row["instructions"].get("mma.sync", 0) > 0, row
