"""File systems in mid-run: one that becomes read-only, one that fills up, and a /dev/shm that is far too small.

Each test mounts them in a namespace of its own, which needs Linux with unshare and mount (util-linux).
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import KILLS, ROOT, read_table

from ks.files.curves import curves_if_any

NAMESPACE = ("unshare", "--mount", *(() if os.getuid() == 0 else ("--map-root-user",)))
FLAGS = "--weight_path weight.pth --num_samples 80 --batch_size 16 --output_dir out --num_epochs 400"
RUN = f"{sys.executable} {ROOT}/train_with_random.py {FLAGS} --rank 2 --resume --save_interval 0"
SWEEP = f"{sys.executable} {ROOT}/rank_sweep_study.py {FLAGS} --ranks 1 2 --jobs 2"
RESUME_STATE = {RUN: "out/ks_chain_resume.pth", SWEEP: "out/rank_2/rank_2_resume.pth"}


def can_mount() -> bool:
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not can_mount(), reason="no mount namespaces here (unshare --mount)")


def in_namespace(folder, *command):
    """Run a command in a mount namespace of its own."""
    done = subprocess.run([*NAMESPACE, *command], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


READ_ONLY, FULL = "Read-only file system", "No space left on device"
BREAK_AND_MEND = {
    READ_ONLY: (  # busy while a file is open for writing
        "mount --bind out out; until mount -o remount,bind,ro out 2> /dev/null; do sleep 0.01; done",
        "umount out",
    ),
    FULL: ("dd if=/dev/zero of=out/ballast status=none || true", "rm out/ballast"),
}


# make test-faults has all four.
CASES = [(RUN, READ_ONLY), (SWEEP, FULL), *([(RUN, FULL), (SWEEP, READ_ONLY)] if KILLS > 3 else [])]


@pytest.mark.parametrize(("command", "trouble"), CASES)
def test_what_ends_a_study_in_mid_run_costs_no_finished_epoch(weight_path, tmp_path, command, trouble):
    break_it, mend_it = BREAK_AND_MEND[trouble]
    script = f"""
        mkdir out; mount -t tmpfs -o size=2m tmpfs out
        {command} > first.txt 2> first_errors.txt & process=$!
        until [ -e {RESUME_STATE[command]} ]; do sleep 0.02; kill -0 $process; done
        {break_it}
        wait $process && echo 0 > codes.txt || echo $? > codes.txt
        cp -r out kept; {mend_it}
        {command} > second.txt 2> second_errors.txt && echo 0 >> codes.txt || echo $? >> codes.txt
        cp -r out results
    """
    in_namespace(tmp_path, "bash", "-ec", script)
    errors = (tmp_path / "first_errors.txt").read_text()
    assert (tmp_path / "codes.txt").read_text().split() == ["1", "0"], errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert trouble in last
    assert f"{tmp_path}/out/" in last
    assert "fix the cause, then rerun the same command" in last
    kept, results = (
        curves_if_any(next((tmp_path / name).rglob("*rank_2_loss_curves.csv"))) for name in ("kept", "results")
    )
    assert 0 < len(kept) < len(results) == 400
    assert [row["val_loss"] for row in results[: len(kept)]] == [row["val_loss"] for row in kept]
    assert "resume" in (tmp_path / "second_errors.txt").read_text()
    assert not [path.name for path in (tmp_path / "results").rglob(".*")]


SAVE = """
import contextlib, subprocess, sys, torch, ks
from ks.errors import UsageError
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
moments = ks.collect_input_moments(model, [torch.randn(300, 64)], "**", quiet=True)
small = ks.compress(model, ks.plan_model(model, budget=0.5, moments=moments, quiet=True), moments=moments, quiet=True)
def save():
    for save, name in ((lambda path: ks.save_compressed(small, path), "model"), (moments.save, "moments.safetensors")):
        try:
            save(f"out/{name}")
            print("saved")
        except UsageError as error:
            print(error)
def shell(script):
    return subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True).stdout
shell("mkdir out; mount -t tmpfs -o size=400k tmpfs out")
save()
before = shell("find out -type f | sort | xargs sha256sum")
for break_it, mend_it in eval(sys.argv[1]):
    shell(break_it)
    save()
    shell(mend_it)
assert shell("find out -type f | sort | xargs sha256sum") == before
save()
"""


def test_models_and_moments_that_cannot_be_written_leave_what_was_there(tmp_path):
    (tmp_path / "save.py").write_text(SAVE)
    command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "save.py", str([*BREAK_AND_MEND.values()])]
    lines = in_namespace(tmp_path, *command).stdout.splitlines()
    assert [line == "saved" for line in lines] == [True, True, False, False, False, False, True, True]
    for trouble, (model, moments) in zip(BREAK_AND_MEND, (lines[2:4], lines[4:6])):
        assert "out/model cannot be written (" in model
        assert "out/moments.safetensors cannot be written (" in moments
        assert trouble in model
        assert trouble in moments


def test_a_sweep_needs_nothing_of_dev_shm(tmp_path):
    """The samples of 2 MB that its runs share, their threads and its figures do without."""
    torch.save(torch.randn(16, 64), tmp_path / "weight.pth")
    flags = "--num_samples 8000 --num_epochs 2 --batch_size 100"
    script = f"mount -t tmpfs -o size=4k tmpfs /dev/shm; echo full > /dev/shm/full; OMP_NUM_THREADS=2 {SWEEP} {flags}"
    done = in_namespace(tmp_path, "bash", "-ec", script)
    assert "every run draws its own samples" not in done.stderr
    assert {row["status"] for row in read_table(tmp_path / "out/rank_sweep_summary.csv")} == {"ok"}
