"""Tensors that are no ordinary dense weight: refused in a line with file and kind, or read as they are."""

import json
import warnings

import pytest
import torch
from folders import refused

import rank_sweep_study
import train_with_random
from ks.errors import UsageError
from ks.files.weights import load_weight


def weight(dtype=torch.float32):
    return torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def with_nan(value):
    changed = weight()
    changed[3, 5] = value
    return changed


def nested():
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.strided)


REFUSED = {
    "sparse COO": (lambda: weight().to_sparse(), "is sparse"),
    "sparse CSR": (lambda: weight().to_sparse_csr(), "is sparse"),
    "quantised": (lambda: torch.quantize_per_tensor(weight(), 0.1, 0, torch.qint8), ""),
    "nested, strided": (nested, ""),
    "meta": (lambda: weight().to("meta"), "is a meta tensor without values"),
    "complex": (lambda: weight(torch.complex64), "has dtype complex64"),
    "conjugate view": (lambda: weight(torch.complex64).conj(), "has dtype complex64"),
    "integers": (lambda: weight(torch.int32), "has dtype int32"),
    "float8": (lambda: weight(torch.float8_e4m3fn), "has dtype float8_e4m3fn"),
    "NaN": (lambda: with_nan(float("nan")), "NaN or infinite"),
    "infinite": (lambda: with_nan(float("-inf")), "NaN or infinite"),
    "zero": (lambda: torch.zeros(16, 24), "all zero"),
    "one dimension": (lambda: torch.ones(16), "has shape (16,)"),
    "three dimensions": (lambda: torch.ones(4, 4, 2), "has shape (4, 4, 2)"),
    "0 rows": (lambda: torch.ones(0, 24), "has shape (0, 24)"),
}


@pytest.fixture(autouse=True)
def no_warning():
    """A warning would be further lines on stderr."""
    with warnings.catch_warnings(action="error"):
        yield


def make(case):
    with warnings.catch_warnings(action="ignore"):
        return REFUSED[case][0]()


def is_one_line_about(path, error, message):
    assert "\n" not in str(error)
    assert len(str(error)) < 1500
    assert str(path) in str(error)
    assert message in str(error)


@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_that_is_no_dense_weight_is_refused(tmp_path, case):
    message = REFUSED[case][1]
    path = tmp_path / "w.pth"
    torch.save(make(case), path)
    with pytest.raises(UsageError) as raised:
        load_weight(path)
    is_one_line_about(path, raised.value, message)


@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_that_is_no_dense_weight_is_refused_by_its_key(tmp_path, case):
    path = tmp_path / "w.pth"
    torch.save({"layer": {"w": make(case)}, "step": 5}, path)
    with pytest.raises(UsageError) as raised:
        load_weight(path, "layer.w")
    is_one_line_about(path, raised.value, "layer.w")


@pytest.mark.parametrize("case", ["complex", "integers", "one dimension", "nested, strided"])
def test_tensors_of_other_kinds_beside_the_weight_do_no_harm(tmp_path, case):
    torch.save({"other": make(case), "w": weight()}, tmp_path / "w.pth")
    assert torch.equal(load_weight(tmp_path / "w.pth").tensor, weight())


@pytest.mark.parametrize("main", [train_with_random.main, rank_sweep_study.main], ids=["training", "sweep"])
def test_a_script_refuses_it_in_one_line(tmp_path, capsys, main):
    torch.save(make("nested, strided"), tmp_path / "w.pth")
    arguments = ["--weight_path", tmp_path / "w.pth", "--output_dir", tmp_path / "out"]
    assert str(tmp_path / "w.pth") in refused(main, arguments, capsys, tmp_path)


READ = {
    "negative view": lambda: torch.complex(torch.zeros(16, 24), -weight()).conj().imag,
    "strided view": lambda: torch.stack([weight(), weight()], -1).flatten(1)[:, ::2],
    "a Parameter": lambda: torch.nn.Parameter(weight()),
    "float16": lambda: weight(torch.float16),
    "bfloat16": lambda: weight(torch.bfloat16),
    "float64": lambda: weight(torch.float64),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", READ)
def test_every_view_of_a_dense_weight_is_read_with_its_values(tmp_path, case, legacy):
    made = READ[case]()
    torch.save(made, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    found = load_weight(tmp_path / "w.pth")
    assert torch.equal(found.tensor, made.detach())
    assert found.tensor.is_contiguous()
    assert not found.tensor.is_neg()
    assert len(found.sha256()) == 64


def safetensors(path, dtype, shape, size):
    head = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(size))


@pytest.mark.parametrize(
    ("dtype", "size"), [("F4", 192), ("F8_E8M0", 384), ("F9", 384), (7, 384), ("C64", 3072)], ids=str
)
def test_a_dtype_of_safetensors_that_is_no_weight_is_refused(tmp_path, dtype, size):
    path = tmp_path / "w.safetensors"
    safetensors(path, dtype, [16, 24], size)
    for key in (None, "w"):
        with pytest.raises(UsageError) as raised:
            load_weight(path, key)
        is_one_line_about(path, raised.value, "")


@pytest.mark.parametrize(
    "content",
    [
        {"layer": {"w": weight()}, "layer.w": 2 * weight()},
        {"1": weight(), 1: 2 * weight()},
        {"": {"w": weight()}, "w": 2 * weight()},
    ],
    ids=["dict and dot", "text and number", "empty name"],
)
def test_two_tensors_of_one_name_are_refused_even_with_a_key(tmp_path, content):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    for key in (None, "w", "layer.w", "1"):
        with pytest.raises(UsageError) as raised:
            load_weight(path, key)
        is_one_line_about(path, raised.value, "two tensors with the name")
