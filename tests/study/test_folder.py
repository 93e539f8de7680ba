"""A results folder belongs to one study."""

import dataclasses
from pathlib import Path

import pytest

import rank_sweep_study
from ks.errors import UsageError
from ks.files.atomic import read_json, write_json
from ks.files.layout import SweepFiles
from ks.study import folder
from ks.study.folder import claim_folder
from ks.study.runs import runs_of
from ks.study.weight_study import WeightStudy

CONFIG = rank_sweep_study.build_parser().parse(["--weight_path", "w.pth"])


def claim_it(files, runs, settings=None, *, overwrite=False):
    record = {"settings": settings or {"lr": 0.1}, "ranks": [run.rank for run in runs]}
    place = {"output_dir": str(files.directory), "save_prefix": files.prefix}
    claim_folder(dataclasses.replace(CONFIG, **place, overwrite=overwrite), runs, record)


def test_a_claim_is_repeated_but_not_for_another_study(tmp_path):
    files, (run,) = SweepFiles(tmp_path, "p"), runs_of(CONFIG, [2], tmp_path, Path("trainer.py"))
    claim_it(files, [run])
    assert not run.files.directory.exists()
    files.summary_csv.touch()
    run.files.directory.mkdir()
    run.files.final.touch()
    write_json(run.files.config, {"files": [run.files.final.name]})
    claim_it(files, [run])
    assert run.files.final.exists()
    assert not files.summary_csv.exists()
    with pytest.raises(UsageError, match=r"another study \(lr was 0.1, now 0.2\)"):
        claim_it(files, [run], {"lr": 0.2})
    claim_it(files, [run], {"lr": 0.2}, overwrite=True)
    assert read_json(files.config)["settings"] == {"lr": 0.2}
    assert list(run.files.directory.iterdir()) == []


def test_results_without_a_record_are_refused(tmp_path):
    files, (run,) = SweepFiles(tmp_path, "p"), runs_of(CONFIG, [2], tmp_path, Path("trainer.py"))
    run.files.directory.mkdir()
    run.files.final.touch()
    with pytest.raises(UsageError, match="results of something else"):
        claim_it(files, [run])
    with pytest.raises(UsageError, match="no record says that this toolkit wrote it"):
        claim_it(files, [run], overwrite=True)
    assert run.files.final.exists()


def test_a_record_without_a_list_of_files_is_one_of_an_older_version(tmp_path):
    files, (run,) = SweepFiles(tmp_path, "p"), runs_of(CONFIG, [2], tmp_path, Path("trainer.py"))
    run.files.directory.mkdir()
    for record in (files.config, run.files.config):
        write_json(record, {"settings": {"lr": 0.1}, "provenance": {}, "ranks": [2]})
    run.files.final.touch()
    files.summary_csv.touch()
    claim_it(files, [run])
    assert run.files.final.exists()


def test_a_claim_that_fails_half_way_can_be_repeated(tmp_path, monkeypatch):
    runs = runs_of(CONFIG, [2, 4], tmp_path, Path("trainer.py"))
    files = SweepFiles(tmp_path, "p")

    def full_disk(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_json", full_disk)
        with pytest.raises(OSError, match="No space"):
            claim_it(files, runs)
    claim_it(files, runs)
    assert read_json(files.config)["ranks"] == [2, 4]


def test_another_study_is_refused_before_floors_are_computed(weight_path, tmp_path, monkeypatch, capsys):
    write_json(tmp_path / "rank_sweep_config.json", {"settings": {"lr": 0.2}, "ranks": [2], "seeds": [0]})
    monkeypatch.setattr(WeightStudy, "plan", None)
    assert rank_sweep_study.main(["--weight_path", str(weight_path), "--output_dir", str(tmp_path)]) == 2
    assert "holds another study (" in capsys.readouterr().err
