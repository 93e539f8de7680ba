"""Fixtures shared by the tests: scripts run as users run them, from another folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    """Run one of the scripts in a subprocess whose working directory is not the repository."""

    def run_script(script: str, *arguments, env: dict | None = None, timeout: float = 120):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run_script


@pytest.fixture(autouse=True)
def leave_no_process(request):
    """A test that fails half-way must not leave trainings behind."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder is not None:
        subprocess.run(["pkill", "-KILL", "-f", str(folder)], check=False)


@pytest.fixture
def weight_path(tmp_path) -> Path:
    """A saved 16 × 24 weight."""
    path = tmp_path / "weight.pth"
    torch.save(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), path)
    return path


QUICK = ("--num_samples", "80", "--batch_size", "16", "--num_epochs", "3")


def pytest_terminal_summary(terminalreporter):
    """That no GPU test or no Ray test was run is said, and never looks like a pass."""
    reasons = {"GPU": "there is no CUDA device", "Ray": "make test-ray runs them"}
    for name, reason in reasons.items():
        ran, skipped = (
            [report for report in terminalreporter.getreports(outcome) if name.lower() in report.keywords]
            for outcome in ("passed", "skipped")
        )
        if skipped and not ran:
            terminalreporter.write_line(f"No {name} test was run: {len(skipped)} skipped, {reason}.")
