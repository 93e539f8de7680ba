"""The kernels as machine code for five generations of GPUs, compiled without one. `make test-cubins` has all of it."""

import contextlib
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_table
from kernel_cases import FACTOR_CASES, GRADIENT_CASES, check_factor, check_values_gradient

from ks.product import tiles

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from ks.product import triton_kernels

INSTRUCTION = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC", 120: "HMMA"}


def compiled(*arguments, program="compile_kernels.py") -> list[dict]:
    command = [sys.executable, ROOT / "benchmarks" / program, "--format", "json", *map(str, arguments)]
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


@pytest.fixture(
    scope="module",
    params=[("--archs", 90, "--dtypes", "float16"), pytest.param((), marks=pytest.mark.cubins)],
    ids=["few", "many"],
)
def step_rows(request):
    return compiled(*request.param, program="compile_step.py")


def test_the_kernels_of_the_fused_step_stay_in_registers(step_rows):
    assert len({row["kernel"] for row in step_rows}) == 5
    for row in step_rows:
        assert not row["local_memory"], row
        assert row["programs"] >= 4, row


def test_their_arrays_are_loaded_at_least_8_bytes_at_a_time(step_rows):
    """The loads of 4 bytes are those of single numbers: scale, rate, counters, ten for each of two factors at most."""
    for row in step_rows:
        narrow = row["global_load_bytes"].get("4", 0)
        wide = sum(count for width, count in row["global_load_bytes"].items() if int(width) >= 8)
        assert wide, row
        assert narrow <= {"update_kernel": 10, "finish_kernel": 8, "loss_kernel": 1}.get(row["kernel"], 0), row
        assert "2" not in row["global_load_bytes"], row


def test_the_host_time_of_a_call_is_measured_without_a_gpu(tmp_path):
    """Every call launches one kernel; nothing is said about its time."""
    command = [sys.executable, ROOT / "benchmarks" / "host_time.py", "--calls", "3", "--csv", tmp_path / "host.csv"]
    subprocess.run(command, capture_output=True, check=True, timeout=300)
    rows = read_table(tmp_path / "host.csv")
    assert [row["call"] for row in rows] == ["apply_factor", "values_gradient", "norm", "update"]
    assert all(row["launches"] == "1" and float(row["host_us"]) > 0 for row in rows)


def test_the_correctness_tests_of_a_gpu_compile_few_kernels(monkeypatch):
    """A kernel is compiled anew for other constants, options, dtypes, and integers that are 1 or multiples of 16."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compile_kernels

    compiled = set()
    for name in compile_kernels.KERNELS:
        recorder = SpecialisationRecorder(getattr(triton_kernels, name), compiled)
        monkeypatch.setattr(triton_kernels, name, recorder)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for pattern, *layouts, batch, transposed in FACTOR_CASES:
            with contextlib.suppress(AssertionError):  # nothing was computed
                check_factor(triton_kernels, pattern, dtype, *layouts, batch, transposed)
        for pattern, *layouts, batch in GRADIENT_CASES:
            with contextlib.suppress(AssertionError):
                check_values_gradient(triton_kernels, pattern, dtype, *layouts, batch)
    assert 60 < len(compiled) <= 160


class SpecialisationRecorder:
    def __init__(self, kernel, compiled: set):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(*arguments, **keywords):
            shapes = [
                str(value.dtype) if isinstance(value, torch.Tensor) else 1 if value == 1 else value % 16 == 0
                for value in arguments
            ]
            self.compiled.add((self.kernel.fn.__name__, *shapes, *keywords.items()))

        return launch


def test_tf32_uses_tensor_cores_only_when_asked_for():
    for row in compiled("--dtypes", "float32", "--ranks", 4, "--batches", 1024, "--archs", 80, "--precision", "tf32"):
        assert any(name.startswith("HMMA") for name in row["instructions"]), row
