"""Sizes that no machine has, in files and in flags: refused from arithmetic, before anything is allocated."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from folders import GIB, bomb, call, limit_memory, plan, refused

import generate_test_weight
import ks
import plot_rank_results
import rank_sweep_study
import train_with_random
from ks.errors import UsageError
from ks.files.weights import load_weight


def expanded(path: Path, *shape: int) -> None:
    torch.save({"w": torch.ones(1).expand(*shape)}, path)


def shared_lists(path: Path) -> None:
    """Write 40 lists, each with the next one twice: 2**40 references in 1 KB."""
    node: list = [torch.ones(2)]
    for _ in range(40):
        node = [node, node]
    torch.save(node, path)


def huge_npy(path: Path) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
        file.write(bytes(64))


def huge_safetensors(path: Path) -> None:
    """Write a file of 8 GiB that takes no room on disk."""
    head = f'{{"w":{{"dtype":"F32","shape":[65536,32768],"data_offsets":[0,{8 * GIB}]}}}}'.encode()
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(file.tell() + 8 * GIB)


def long_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def many_tensors(path: Path) -> None:
    path.write_bytes(pickle.dumps([0] * 1_200_000))


WEIGHTS = {
    "zip bomb of 1 GiB": ("w.pth", lambda path: bomb(path, GIB), "unpacked, needs 1 GiB of memory, 0.5 GiB"),
    "expanded tensor of 4 EB": ("w.pth", lambda path: expanded(path, 10**9, 10**9), "of memory"),
    "2**40 shared references": ("w.pth", shared_lists, "it holds no 2-D floating weight"),
    "npy that declares 4 TB": ("w.npy", huge_npy, "cannot be read as weights"),
    "safetensors with a hole of 8 GiB": ("w.safetensors", huge_safetensors, "8 GiB of memory"),
    "safetensors with a header of 4 EB": ("w.safetensors", long_header, "cannot be read as weights"),
    "a pickle that is no torch file": ("w.pth", many_tensors, "cannot be read as weights"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_file_that_is_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch, capsys, case):
    name, make, message = WEIGHTS[case]
    make(tmp_path / name)
    limit_memory(monkeypatch, GIB // 2)
    started = time.monotonic()
    with pytest.raises(UsageError) as raised:
        load_weight(tmp_path / name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)
    assert time.monotonic() - started < 30


def test_a_zip_bomb_needs_no_memory_of_its_size(tmp_path):
    """Under a limit of the address space that the declared size would exceed, the file is refused in one line."""
    bomb(tmp_path / "w.pth", GIB)
    script = (
        "import resource, sys\n"
        "import train_with_random\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + {GIB // 2}, -1))\n"
        "sys.exit(train_with_random.main(['--weight_path', 'w.pth', '--output_dir', 'out']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "unpacked, needs 1 GiB of memory" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("patterns", [[[1, 60000, 60000, 1]], [[1, 60000, 10000, 1]] + [[1, 10000, 10000, 1]] * 2])
def test_a_saved_chain_of_expanded_tensors_is_refused_before_anything_is_allocated(tmp_path, monkeypatch, patterns):
    """Also if each of its tensors would fit, but not all of them."""
    ks.KSLinear(4, 4).save(tmp_path / "chain.pth")
    state = {f"factors.{index}": torch.ones(1).expand(*shape) for index, shape in enumerate(patterns)}
    saved = torch.load(tmp_path / "chain.pth", weights_only=True)
    torch.save(saved | {"patterns": patterns, "state_dict": state}, tmp_path / "chain.pth")
    limit_memory(monkeypatch, 3 * GIB)
    monkeypatch.setattr(ks.layer, "empty_blocks", lambda *place: pytest.fail("allocated"))
    with pytest.raises(UsageError, match="of memory, 3 GiB is available"):
        ks.load(tmp_path / "chain.pth")


RUNS = {
    "num_samples 10**19": ["--num_samples", 10**19],
    "num_samples of 5000 digits": ["--num_samples", "9" * 5000],
    "num_factors 10**9": ["--chain", "butterfly", "--num_factors", 10**9],
    "num_factors 1": ["--chain", "butterfly", "--num_factors", 1],
    "batch_size 10**12": ["--batch_size", 10**12],
    "row_splits 10**18": ["--row_splits", 10**18, 2, "--col_splits", 2, 12],
    "seed 2**63": ["--seed", 2**63],
    "num_epochs 10**12": ["--num_epochs", 10**12],
    "blocks 10**12": ["--blocks", 10**12],
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_of_that_size_is_refused(weight_path, tmp_path, monkeypatch, capsys, case):
    limit_memory(monkeypatch)
    started = time.monotonic()
    arguments = ["--weight_path", weight_path, "--output_dir", tmp_path / "out", *RUNS[case]]
    assert len(refused(train_with_random.main, arguments, capsys, tmp_path)) < 300
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("rank", [0, 2**31, "9" * 5000, "1e3", "²"])
@pytest.mark.parametrize("main", [train_with_random.main, rank_sweep_study.main], ids=["training", "sweep"])
def test_a_rank_of_that_size_is_refused(weight_path, tmp_path, capsys, main, rank):
    flag = "--rank" if main is train_with_random.main else "--ranks"
    line = refused(main, ["--weight_path", weight_path, flag, rank], capsys, tmp_path)
    assert "is not a whole number from 1 to 2147483647" in line
    assert len(line) < 300


def test_the_largest_rank_is_one_above_saturation(weight_path, capsys):
    main, *arguments = plan(weight_path, "--ranks", 2**31 - 1)
    assert call(main, *arguments) == 0
    assert "2147483647" in capsys.readouterr().out


@pytest.mark.parametrize("dpi", [1, 10**30])
def test_a_figure_of_that_size_is_refused(swept, weight_path, tmp_path, capsys, dpi):
    results = swept[0] / "rank_sweep_results"
    refused(plot_rank_results.main, ["--results_dir", results, "--dpi", dpi], capsys, results)
    refused(rank_sweep_study.main, ["--weight_path", weight_path, "--dpi", dpi], capsys, tmp_path)


GENERATED = {
    "10**9 x 10**9": [10**9, 10**9],
    "power_law, 10**6 x 10**6": [10**6, 10**6, "--init_method", "power_law"],
    "rank 10**10": [8, 8, "--init_method", "lowrank_plus_noise", "--rank", 10**10],
    "noise 1e300": [8, 8, "--init_method", "lowrank_plus_noise", "--noise", "1e300"],
    "num_factors 10**11": [8, 8, "--chain", "butterfly", "--num_factors", 10**11],
    "blocks 2147483647 on a large prime": [2**31 - 1, 2**31 - 1, "--blocks", 2**31 - 2],
}


@pytest.mark.parametrize("case", GENERATED)
def test_a_weight_of_that_size_is_not_made(tmp_path, monkeypatch, capsys, case):
    limit_memory(monkeypatch)
    rows, cols, *more = GENERATED[case]
    started = time.monotonic()
    arguments = ["--output_features", rows, "--input_features", cols, "--output_path", tmp_path / "w.pth", *more]
    assert len(refused(generate_test_weight.main, arguments, capsys, tmp_path)) < 400
    assert time.monotonic() - started < 10
