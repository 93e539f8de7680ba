"""Fixtures and helpers of all tests: they start scripts as users do, in another folder, and read the files."""

import contextlib
import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads, and for every script that a test starts

import pytest
import torch
import warm

import ks
from ks.errors import UsageError
from ks.files.layout import RunFiles, run_files
from ks.moments.second_moment import VectorSums
from ks.training.resume_state import ResumeState

torch.set_num_threads(1)

# How often test_survival kills; make test-faults sets it to 20 and runs every hostile case.
KILLS = int(os.environ.get("KS_TEST_KILLS", "3"))
ALL_FAULTS = KILLS >= 20

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--num_samples", "80", "--batch_size", "16", "--num_epochs", "3", "--latency_seconds", "0")


@pytest.fixture
def run(tmp_path):
    """Run one of the scripts, or a copy with its full path, in a subprocess; its working directory is tmp_path."""

    def run_script(script: str, *arguments, env: dict | None = None, timeout: float = 120):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run_script


@pytest.fixture(autouse=True, scope="session")
def nursery():
    """Scripts that a test starts are forks of a process that has torch; see warm.py."""
    if sys.platform != "linux":
        yield
        return
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(warm.Nursery()) as nursery:
        patch.setattr(subprocess, "_fork_exec", nursery.fork_exec)
        yield


@pytest.fixture
def cold(monkeypatch):
    """Let scripts start and draw as they do outside the tests; see warm.py."""
    monkeypatch.setattr(subprocess, "_fork_exec", warm.start_cold)


@pytest.fixture
def blank_pictures(monkeypatch):
    """Let scripts that are called in this process save empty pictures."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", warm.save_blank)


def processes_in(folder) -> list[int]:
    """The processes whose working directory is the folder or lies in it; none but on Linux."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                found.append(int(entry.name))
    return found


def runs_in(folder) -> list[int]:
    """Runs of a sweep there: processes that write to a log."""
    found = []
    for process in processes_in(folder):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{process}/fd/1").endswith(".log"):
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def leave_no_process(request):
    """A test that fails half-way must not leave runs behind."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder is not None:
        for process in {*processes_in(folder)} - {os.getpid()}:
            os.kill(process, signal.SIGKILL)


@pytest.fixture
def no_hang():
    """A read that blocks, as that of a FIFO does, ends the test."""

    def hung(signum, frame):
        raise AssertionError("hung")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def weight_path(tmp_path) -> Path:
    """A saved 16 × 24 weight."""
    path = tmp_path / "weight.pth"
    torch.save(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), path)
    return path


CRITERION = "criterion = mean_squared_error  # edit here\n"
METRICS = "    return {}\n"


def edited_text(criterion: str = "", metrics: str = "") -> str:
    """The text of the training script with another criterion, or another end of `metrics`."""
    text = (ROOT / "train_with_random.py").read_text()
    for before, after in ((CRITERION, criterion), (METRICS, metrics)):
        assert text.count(before) == 1
        text = text.replace(before, f"{after}\n") if after else text
    return text


@pytest.fixture
def edited(tmp_path):
    """Edit a copy of the training script in tmp_path, and import it."""

    def edit(criterion: str = "", metrics: str = ""):
        path = tmp_path / "train_with_random.py"
        path.write_text(edited_text(criterion, metrics))
        spec = importlib.util.spec_from_file_location("edited_trainer", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return edit


def copy_toolkit(folder: Path) -> None:
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ks", folder / "ks", ignore=ignored, dirs_exist_ok=True)


@pytest.fixture
def edited_toolkit(tmp_path):
    """Copy the toolkit to tmp_path, and edit its training script as a user would; again to edit it again."""

    def edit(criterion: str = "", metrics: str = "") -> None:
        copy_toolkit(tmp_path)
        (tmp_path / "train_with_random.py").write_text(edited_text(criterion, metrics))

    return edit


@pytest.fixture(scope="session")
def swept(tmp_path_factory):
    """One small sweep that several tests look at and none changes: (folder, completed process)."""
    folder = tmp_path_factory.mktemp("swept")
    torch.save(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), folder / "weight.pth")
    command = [sys.executable, str(ROOT / "rank_sweep_study.py"), "--weight_path", "weight.pth", *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "_fork_exec", warm.start_cold)
        done = subprocess.run([*command, "--ranks", "4", "2", "4", "100"], cwd=folder, capture_output=True, text=True)
    return folder, done


def read_table(path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def files_of(results_dir, rank: int, seed: int | None = None) -> RunFiles:
    """The files of one rank of a sweep; of its first seed, if none is given."""
    return run_files(results_dir, rank, seed, None)


@contextlib.contextmanager
def refusal(message: str):
    """Check that the user's error is reported, in one line that matches a regular expression."""
    with pytest.raises(UsageError, match=message) as raised:
        yield raised
    assert "\n" not in str(raised.value)


def dense_loss(weight: torch.Tensor, chain: ks.KSLinear) -> float:
    """The population loss of a saved chain on inputs of second moment I, from its dense weight."""
    return ((weight.double() - chain.to_dense().double()).square().sum() / len(weight)).item()


def floor_of(weight: torch.Tensor, rank: int) -> float:
    return ks.loss_floor(weight, ks.make_chain(*weight.shape), [rank])[0].lower


def save_moments(
    path,
    rows: torch.Tensor,
    held_out: torch.Tensor | None = None,
    key: str = "layer.weight",
    gradients: torch.Tensor | None = None,
    held_out_gradients: torch.Tensor | None = None,
) -> Path:
    """Save the moments of the inputs of one weight, and of the gradients at its outputs; its key is needed nowhere."""
    from ks.moments.moments_file import InputMoments  # the tests of a borrowed card run without its msgspec

    def sums(name: str, given: torch.Tensor | None) -> dict[str, VectorSums]:
        return {} if given is None else {name: VectorSums.of(given)}

    name = key.removesuffix(".weight")
    loss = {} if gradients is None else {"loss": "next token", "unit": "nats"}
    InputMoments(
        sums(name, rows),
        sums(name, held_out),
        {key: name},
        {name: 1},
        gradients=sums(key, gradients),
        held_out_gradients=sums(key, held_out_gradients),
        **loss,
    ).save(path)
    return path


def interrupt_in_epoch(monkeypatch, epoch: int) -> None:
    """Interrupt a run after it recorded this epoch and before its resume state holds it, as a kill may."""
    offer = ResumeState.offer

    def stop(self, threads, curves, *state):
        if len(curves) == epoch:
            raise KeyboardInterrupt
        offer(self, threads, curves, *state)

    monkeypatch.setattr(ResumeState, "offer", stop)


def wait_for(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


LONGEST_FIRST = (
    *("study/test_survival.py", "hostile/test_stops.py", "bounds/test_coupled_floors.py"),
    *("hostile/test_surroundings.py", "test_docs.py", "scripts/test_going_on.py"),
    *("scripts/test_checkpoint_study.py", "model/test_in_order.py"),
)


def pytest_collection_modifyitems(items):
    """Put the files of LONGEST_FIRST before the others, which keep their order."""
    place = {str(ROOT / "tests" / name): index for index, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))


def pytest_terminal_summary(terminalreporter):
    """Count the hostile cases by class, and report optional tests that were not run: they are no pass."""
    hostile: dict[str, list[str]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            folder, name = Path(report.nodeid.split("::")[0]).parts[-2:]
            if folder == "hostile" and report.when == "call":
                hostile.setdefault(name.removeprefix("test_").removesuffix(".py"), []).append(outcome)
    for name, outcomes in sorted(hostile.items()):
        terminalreporter.write_line(f"Hostile cases, {name}: {outcomes.count('passed')} of {len(outcomes)} held.")
    reasons = {
        "gpu": ("GPU", "there is no CUDA device"),
        "ray": ("Ray", "make test-ray runs them"),
        "slurm": ("SLURM", "make test-slurm runs them"),
        "trackers": ("tracker", "make test-trackers runs them"),
    }
    for marker, (name, reason) in reasons.items():
        ran, skipped = (
            [report for report in terminalreporter.getreports(outcome) if marker in getattr(report, "keywords", ())]
            for outcome in ("passed", "skipped")
        )
        if skipped and not ran:
            terminalreporter.write_line(f"No {name} test was run: {len(skipped)} skipped, {reason}.")
