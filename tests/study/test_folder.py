"""A results folder belongs to one study."""

import dataclasses
from pathlib import Path

import pytest

import rank_sweep_study
from ks.cli.flags import SweepConfig
from ks.errors import UsageError
from ks.files.atomic import read_json, write_json
from ks.study import folder
from ks.study.folder import claim_folder
from ks.study.runs import runs_of
from ks.study.weight_study import WeightStudy


@pytest.fixture
def config(tmp_path):
    return SweepConfig(weight_path="w.pth", output_dir=str(tmp_path), save_prefix="p")


@pytest.fixture
def run(config):
    return runs_of(config, [2], Path("trainer.py"))[0]


def claim(config, run, lr=0.1, **flags):
    claim_folder(dataclasses.replace(config, **flags), [run], {"settings": {"lr": lr}, "ranks": [run.rank]})


def test_a_claim_is_repeated_but_not_for_another_study(config, run, monkeypatch):
    files = config.files()
    claim(config, run)
    assert not run.files.directory.exists()
    files.summary_csv.touch()
    run.files.directory.mkdir()
    run.files.final.touch()
    write_json(run.files.config, {"files": [run.files.final.name]})
    claim(config, run)
    assert run.files.final.exists()
    assert not files.summary_csv.exists()
    with pytest.raises(UsageError, match=r"another study \(lr was 0.1, now 0.2\)"):
        claim(config, run, 0.2)
    monkeypatch.chdir(files.directory)
    with pytest.raises(UsageError, match=f"to keep it: .* --output_dir {files.directory}_2 "):
        claim(config, run, 0.2, output_dir="./")
    claim(config, run, 0.2, overwrite=True)
    assert read_json(files.config)["settings"] == {"lr": 0.2}
    assert list(run.files.directory.iterdir()) == []


def test_results_without_a_record_are_refused(config, run):
    run.files.directory.mkdir()
    run.files.final.touch()
    with pytest.raises(UsageError, match="results of something else"):
        claim(config, run)
    with pytest.raises(UsageError, match="no record lists it as the toolkit's"):
        claim(config, run, overwrite=True)
    assert run.files.final.exists()


def test_a_record_without_a_list_of_files_is_one_of_an_older_version(config, run):
    files = config.files()
    run.files.directory.mkdir()
    for record in (files.config, run.files.config):
        write_json(record, {"settings": {"lr": 0.1}, "provenance": {}, "ranks": [2]})
    run.files.final.touch()
    files.summary_csv.touch()
    claim(config, run)
    assert run.files.final.exists()


def test_a_claim_that_fails_half_way_can_be_repeated(config, run, monkeypatch):
    def full_disk(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_json", full_disk)
        with pytest.raises(OSError, match="No space"):
            claim(config, run)
    claim(config, run)
    assert read_json(config.files().config)["ranks"] == [2]


def test_another_study_is_refused_before_floors_are_computed(weight_path, tmp_path, monkeypatch, capsys):
    write_json(tmp_path / "rank_sweep_config.json", {"settings": {"lr": 0.2}, "ranks": [2], "seeds": [0]})
    monkeypatch.setattr(WeightStudy, "plan", None)
    assert rank_sweep_study.main(["--weight_path", str(weight_path), "--output_dir", str(tmp_path)]) == 2
    assert "holds another study (" in capsys.readouterr().err
