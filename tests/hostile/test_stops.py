"""Stops: signals at any moment, storms of them, stopped and killed processes; nothing half-written, no orphan.

`make test` runs the first cases of every table, `make test-faults` all.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ALL_FAULTS, ROOT, processes_in, runs_in, wait_for

from ks.files.atomic import read_json
from ks.files.curves import read_curves
from ks.files.layout import RunFiles

LONG = ("--weight_path", "weight.pth", "--num_samples", "200", "--num_epochs", "100000", "--output_dir", "out")
COMMANDS = {
    "train_with_random.py": (*LONG, "--rank", "2"),
    "rank_sweep_study.py": (*LONG, "--ranks", "1", "2", "4", "--jobs", "2"),
    "example_rank_sweep.py": ("--output_dir", "out", "--num_epochs", "500"),
}
pytestmark = pytest.mark.usefixtures("cold")  # signals come while it imports
INT, TERM, HUP, QUIT = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
MOMENTS = (0.0, 0.4, 1.5, 3.0, 6.0)  # seconds after the first import: imports, floors, first launch, first epochs
STORMS = [
    ("train_with_random.py", 0.5, (INT,)),
    ("train_with_random.py", 3.0, (HUP, QUIT, TERM)),
    ("train_with_random.py", 3.0, (signal.SIGUSR1,)),
    ("rank_sweep_study.py", 1.5, (INT,)),
    ("rank_sweep_study.py", 6.0, (TERM, INT)),
    ("example_rank_sweep.py", 6.0, (INT,)),
]
if ALL_FAULTS:
    STORMS += [
        (script, moment, sent) for script in COMMANDS for moment in MOMENTS for sent in ((INT,), (TERM,), (HUP, QUIT))
    ]


def start(script, folder):
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *COMMANDS[script]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal; Python has one for SIGINT from the start."""
    caught = Path(f"/proc/{process}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> ((HUP if number == INT else number) - 1) & 1)


@pytest.mark.parametrize(("script", "moment", "sent"), STORMS)
def test_twenty_signals_in_a_second_are_one_interrupt(weight_path, tmp_path, script, moment, sent):
    process = start(script, tmp_path)
    wait_for(lambda: catches(process.pid, sent[0]))
    time.sleep(moment)
    for count in range(20):
        process.send_signal(sent[count % len(sent)])
        time.sleep(0.05)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not processes_in(tmp_path)
    assert not list(tmp_path.glob("out/**/.*"))  # locks and temporary files


def wait_for_checkpoints(folder, count):
    wait_for(lambda: len(list(folder.glob("out/rank_*/*_curves.csv"))) >= count)
    return runs_in(folder)


@pytest.mark.parametrize("sent", [TERM, signal.SIGKILL])
def test_stopped_runs_end_with_their_sweep(weight_path, tmp_path, sent):
    process = start("rank_sweep_study.py", tmp_path)
    trainers = wait_for_checkpoints(tmp_path, 2)
    assert len(trainers) == 2
    for trainer in trainers:
        os.kill(trainer, signal.SIGSTOP)
    process.send_signal(sent)
    process.communicate(timeout=30)
    wait_for(lambda: not processes_in(tmp_path), seconds=15)
    for rank in (2, 4):
        assert (tmp_path / f"out/rank_{rank}/rank_{rank}_resume.pth").exists()


def test_a_killed_demo_leaves_no_process(tmp_path):
    process = start("example_rank_sweep.py", tmp_path)
    wait_for(lambda: list(tmp_path.glob("out/rank_*/*_curves.csv")))
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_in(tmp_path), seconds=15)


@pytest.mark.parametrize("sent", [INT, TERM, HUP, QUIT])
def test_a_run_leaves_its_checkpoint(weight_path, tmp_path, sent):
    process = start("train_with_random.py", tmp_path)
    files = RunFiles(tmp_path / "out", "ks_chain", 2)
    wait_for(files.curves_csv.exists)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].endswith(
        "interrupted; the finished epochs are kept, and --resume continues after them"
    )
    assert files.best.exists()
    kept = len(torch.load(files.resume)["curves"])
    assert kept >= len(read_curves(files.curves_csv)) - 1
    assert read_json(files.training_log)["status"] == "interrupted"


def test_what_a_killed_process_was_writing_is_swept_up(weight_path, tmp_path):
    """And nothing else: a user's hidden file stays."""
    (tmp_path / "out").mkdir()
    left, kept = tmp_path / "out/.ks_chain_final.4711.tmp.pth", tmp_path / "out/.ks_chain_final.mine.tmp.pth"
    left.touch(), kept.touch()
    command = [sys.executable, str(ROOT / "train_with_random.py"), *LONG, "--num_epochs", "1", "--quiet"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (left.exists(), kept.exists()) == (False, True)
