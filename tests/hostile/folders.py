"""What the tests of this folder share: scripts called in this process, and folders compared before and after."""

import os
import stat
from pathlib import Path

import rank_sweep_study
import train_with_random

QUICK = ("--num_samples", "80", "--batch_size", "16", "--num_epochs", "3", "--rank", "2")
GIB = 2**30


def snapshot(folder) -> dict:
    """Every file of a folder with its content; a FIFO, folder or link with its kind alone."""
    found: dict = {}
    for path in sorted(Path(folder).rglob("*")):
        mode = path.lstat().st_mode
        found[path] = path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return found


def call(main, *arguments) -> int:
    """Call the main function of a script; returns its exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as left:  # argparse
        return left.code


def refused(main, arguments, capsys, folder) -> str:
    """Call a script that must refuse: exit code 2, one line on stderr, no file changed. Returns the line."""
    before = snapshot(folder)
    capsys.readouterr()
    code = call(main, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert "error: " in lines[0]
    assert len(lines[0]) < 3000
    assert snapshot(folder) == before
    return lines[0]


def make_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def train(weight, folder, *arguments) -> int:
    return call(train_with_random.main, "--weight_path", weight, "--output_dir", folder, *QUICK, *arguments)


def plan(weight, *arguments) -> list:
    """The arguments of a sweep that starts nothing."""
    return [rank_sweep_study.main, "--weight_path", weight, "--dry_run", *arguments]


def limit_memory(monkeypatch, limit=GIB) -> None:
    """Say that only so many bytes are available, so that a refusal must come from arithmetic alone."""
    import ks.files.memory

    monkeypatch.setattr(ks.files.memory, "available_bytes", lambda: limit)
