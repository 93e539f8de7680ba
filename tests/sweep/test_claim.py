"""A results folder belongs to one study."""

from pathlib import Path

import pytest

import rank_sweep_study
from ks.errors import UsageError
from ks.files.atomic import read_json, write_json
from ks.files.layout import SweepFiles
from ks.sweep import claim
from ks.sweep.claim import claim_folder
from ks.sweep.run import runs_of

CONFIG = rank_sweep_study.build_parser().parse(["--weight_path", "w.pth"])
RECORD = {"settings": {"lr": 0.1}}


def test_a_claim_is_repeated_but_not_for_another_study(tmp_path):
    files, (run,) = SweepFiles(tmp_path, "p"), runs_of(CONFIG, [2], tmp_path, Path("trainer.py"))
    run.files.directory.mkdir()
    run.files.final.touch()
    with pytest.raises(UsageError, match="results of something else"):
        claim_folder(files, [run], RECORD, overwrite=False)
    write_json(files.config, RECORD)
    files.summary_csv.touch()
    claim_folder(files, [run], RECORD, overwrite=False)
    assert run.files.final.exists()
    assert not files.summary_csv.exists()
    with pytest.raises(UsageError, match=r"another study \(lr was 0.1, now 0.2\)"):
        claim_folder(files, [run], {"settings": {"lr": 0.2}}, overwrite=False)
    claim_folder(files, [run], {"settings": {"lr": 0.2}}, overwrite=True)
    assert read_json(files.config) == {"settings": {"lr": 0.2}}
    assert list(run.files.directory.iterdir()) == []


def test_a_claim_that_fails_half_way_can_be_repeated(tmp_path, monkeypatch):
    runs = runs_of(CONFIG, [2, 4], tmp_path, Path("trainer.py"))
    files, prepare = SweepFiles(tmp_path, "p"), claim.prepare_output_dir

    def full_disk(path):
        if path.name == "rank_4":
            raise OSError(28, "No space left on device")
        return prepare(path)

    with monkeypatch.context() as patched:
        patched.setattr(claim, "prepare_output_dir", full_disk)
        with pytest.raises(OSError, match="No space"):
            claim_folder(files, runs, RECORD, overwrite=False)
    claim_folder(files, runs, RECORD, overwrite=False)
    assert all(run.files.directory.is_dir() for run in runs)
