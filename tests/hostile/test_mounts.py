"""File systems in mid-run: one that becomes read-only, one that fills up, a /dev/shm of a few pages.

Each test mounts them in a namespace of its own, which needs Linux with unshare and mount (util-linux).
"""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

NAMESPACE = ("unshare", "--mount", *(() if os.getuid() == 0 else ("--map-root-user",)))
FLAGS = "--weight_path weight.pth --num_samples 80 --batch_size 16 --output_dir out --num_epochs 3000"
TRAIN = f"{sys.executable} {ROOT}/train_with_random.py {FLAGS} --rank 2 --resume"
SWEEP = f"{sys.executable} {ROOT}/rank_sweep_study.py {FLAGS} --ranks 1 2 --jobs 2"
RESUME_STATE = {TRAIN: "out/.ks_chain_resume.pth", SWEEP: "out/rank_2/.rank_2_resume.pth"}


def can_mount() -> bool:
    try:
        return (
            subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0
        )
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not can_mount(), reason="no mount namespaces here (unshare --mount)")


def run(folder, script):
    """Run a shell script in a mount namespace of its own; returns its process and the exit codes that it printed."""
    command = [*NAMESPACE, "bash", "-ec", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done
