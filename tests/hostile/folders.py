"""What the tests of this folder share: scripts called in this process, and folders compared before and after."""

import os
import stat
import zipfile
from pathlib import Path

import torch

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


def bomb(path: Path, size: int) -> None:
    """Write a torch file whose storage unpacks to zeros of another size, deflated to a thousandth."""
    torch.save({"w": torch.zeros(16, 24)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in entries.items():
            if not name.endswith("data/0"):
                archive.writestr(name, content)
                continue
            with archive.open(name, "w", force_zip64=True) as file:
                zeros = bytes(2**20)
                for _ in range(size // 2**20):
                    file.write(zeros)


def limit_memory(monkeypatch, limit=GIB) -> None:
    """Report that only so many bytes are available, so that a refusal must come from arithmetic alone."""
    import ks.files.memory

    monkeypatch.setattr(ks.files.memory, "available_bytes", lambda: limit)
