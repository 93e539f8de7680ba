"""Surroundings: outputs that cannot be written, odd environments, inputs and folders that change during a sweep."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_table, wait_for

QUICK = "--weight_path weight.pth --num_samples 80 --batch_size 16 --num_epochs 2 --output_dir out"
COMMANDS = {
    "train": f"{sys.executable} {ROOT}/train_with_random.py {QUICK} --rank 2",
    "sweep": f"{sys.executable} {ROOT}/rank_sweep_study.py {QUICK} --ranks 2",
}
RESULTS = {"train": "out/ks_chain_final.pth", "sweep": "out/rank_sweep_summary.csv"}


def shell(folder, command, **environment):
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


REDIRECTIONS = ("| true", "2>&1 | head -1", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>&1")


@pytest.mark.parametrize(
    ("script", "redirection"),
    [*(("train", redirection) for redirection in REDIRECTIONS), *(("sweep", REDIRECTIONS[index]) for index in (1, 4))],
)
def test_an_output_that_cannot_be_written_costs_only_the_text(weight_path, tmp_path, script, redirection):
    done = shell(tmp_path, f"{COMMANDS[script]} {redirection}")
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert (tmp_path / RESULTS[script]).exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "²", "MPLBACKEND": "nonsense", "KS_LIFELINE": "0:1"},
        {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "-3", "CUDA_VISIBLE_DEVICES": "²", "KS_LIFELINE": f"{10**30}:1"},
    ],
    ids=str,
)
def test_an_odd_environment_changes_nothing(weight_path, tmp_path, environment):
    done = shell(tmp_path, COMMANDS["sweep"], **environment)
    assert done.returncode == 0, done.stderr
    assert read_table(tmp_path / RESULTS["sweep"])[0]["status"] == "ok"


def test_every_file_is_utf_8_whatever_the_locale(weight_path, tmp_path):
    """Python warns where a file is opened without an encoding, which would be that of the locale."""
    warn = {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "default::EncodingWarning"}
    done = shell(tmp_path, COMMANDS["sweep"], **warn)
    assert done.returncode == 0, done.stderr
    texts = done.stderr + (tmp_path / "out/rank_2/train.log").read_text()
    ours = [line for line in texts.splitlines() if f"{ROOT}/" in line and "site-packages" not in line]
    assert [line for line in ours if "EncodingWarning" in line] == []


def test_an_isolated_interpreter_finds_the_package(weight_path, tmp_path):
    done = shell(tmp_path, COMMANDS["train"].replace(sys.executable, f"{sys.executable} -I"))
    assert done.returncode == 0, done.stderr


def test_a_terminal_without_the_characters_gets_escapes(weight_path, tmp_path):
    done = shell(tmp_path, COMMANDS["train"].replace("--output_dir out", "--output_dir ü×"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"/\xfc\xd7/" in done.stdout


def test_an_empty_path_is_refused(weight_path, tmp_path):
    done = shell(tmp_path, f"{COMMANDS['sweep']} --output_dir ''")
    assert done.returncode == 2
    assert "a path must not be empty" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def running_sweep(folder, *arguments):
    """A sweep of ranks 2 and 1, one after the other, whose first run has begun."""
    command = [*COMMANDS["sweep"].split(), "--ranks", "1", "2", "--jobs", "1", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(folder.glob("out/rank_2/*_curves.csv")))
    return process


@pytest.mark.parametrize("replaced", ["weight", "inputs"])
def test_a_file_replaced_in_mid_run_gives_no_summary_over_two(weight_path, tmp_path, replaced):
    paths = {"weight": weight_path, "inputs": tmp_path / "inputs.pth"}
    torch.save(torch.randn(100, 24), paths["inputs"])
    process = running_sweep(tmp_path, "--num_epochs", "300", "--inputs", "inputs.pth")
    torch.save(torch.randn(100, 24), paths[replaced])
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    by_rank = {row["rank"]: row for row in read_table(tmp_path / RESULTS["sweep"])}
    assert by_rank["2"]["status"] == "ok"
    assert f"the file of the {replaced} was replaced: trained on sha256 " in by_rank["1"]["status"]


def test_a_rank_folder_deleted_in_mid_run_costs_that_rank(weight_path, tmp_path):
    process = running_sweep(tmp_path, "--num_epochs", "300")
    shutil.rmtree(tmp_path / "out/rank_1", ignore_errors=True)  # there is none before it has started
    (tmp_path / "out/rank_2").rename(tmp_path / "elsewhere")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    assert "Traceback" not in stderr
    by_rank = {row["rank"]: row["status"] for row in read_table(tmp_path / RESULTS["sweep"])}
    assert by_rank["1"] == "ok"
    assert by_rank["2"].startswith("failed")
