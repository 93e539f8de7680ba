"""Only files that a record names as ours are overwritten or deleted; the user's stay, byte for byte."""

import json
import os
import shutil

import pytest
import torch

import example_rank_sweep
import plot_rank_results
import rank_sweep_study
import train_with_random

TRAIN = ("--num_samples", "80", "--batch_size", "16", "--num_epochs", "2", "--quiet")
SWEEP = (*TRAIN, "--ranks", "2", "--jobs", "1")
pytestmark = pytest.mark.usefixtures("blank_pictures")


def contents(folder):
    """Return every file and link below a folder with its content or target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path.relative_to(folder)] = os.readlink(path)
        elif path.is_file():
            found[path.relative_to(folder)] = path.read_bytes()
    return found


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An output folder; the working directory is the one above."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def refused(main, capsys, *arguments):
    """Run a script that must refuse in one line with exit code 2; return the line."""
    assert main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


PREFIX = ("--output_dir", "out", "--save_prefix", "model")


@pytest.mark.parametrize("name", ["best.pth", "config.json", "rank_4_loss_curves.csv"])
def test_a_file_of_the_users_with_a_name_of_ours_stops_a_training(out, weight_path, capsys, name):
    (out / f"model_{name}").write_text("mine")
    line = refused(train_with_random.main, capsys, "--weight_path", weight_path, *TRAIN, *PREFIX)
    assert f"model_{name} is in the way" in line
    assert contents(out) == {(out / f"model_{name}").relative_to(out): b"mine"}


def test_an_epoch_checkpoint_of_the_users_stops_a_training_that_would_write_some(out, weight_path, capsys):
    (out / "model_epoch_1.pth").write_text("mine")
    arguments = ("--weight_path", weight_path, *TRAIN, *PREFIX)
    assert "model_epoch_1.pth is in the way" in refused(
        train_with_random.main, capsys, *arguments, "--save_interval", 1
    )
    assert train_with_random.main([*map(str, arguments), "--save_interval", "0"]) == 0
    assert train_with_random.main([*map(str, arguments), "--save_interval", "0"]) == 0
    assert (out / "model_epoch_1.pth").read_text() == "mine"


@pytest.mark.parametrize("name", ["model_best.pth", "model_final.pth", "model_config.json"])
def test_the_weight_itself_is_never_overwritten(out, weight_path, capsys, name):
    shutil.copy(weight_path, out / "weight.pth")
    (out / "weight.pth").rename(out / name)
    before = contents(out)
    if name.endswith(".json"):
        shutil.copy(weight_path, out / "model_final.pth")
        before = contents(out)
    source = out / ("model_final.pth" if name.endswith(".json") else name)
    refused(train_with_random.main, capsys, "--weight_path", source, *TRAIN, *PREFIX)
    assert contents(out) == before


def test_a_rerun_replaces_its_own_files_and_leaves_the_rest(out, weight_path):
    arguments = [*map(str, ("--weight_path", weight_path, *TRAIN, *PREFIX, "--save_interval", 1))]
    assert train_with_random.main(arguments) == 0
    (out / "notes.txt").write_text("mine")
    (out / "model_notes.pth").write_text("mine")
    assert train_with_random.main([*arguments, "--rank", "2"]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"notes.txt", "model_notes.pth", "model_rank_2_loss_curves.csv"} <= names
    assert "model_rank_4_loss_curves.csv" not in names


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("link", ["rank_2", "rank_2/seed_1"])
def test_nothing_is_written_or_deleted_through_a_linked_folder(out, weight_path, tmp_path, capsys, link, flags):
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "rank_2_final.pth").write_text("mine")
    (out / link).parent.mkdir(exist_ok=True)
    (out / link).symlink_to(target)
    arguments = ("--weight_path", weight_path, *SWEEP, "--seeds", 0, 1, "--output_dir", "out", *flags)
    assert rank_sweep_study.main([*map(str, arguments)]) == 2
    assert contents(target) == {(target / "rank_2_final.pth").relative_to(target): b"mine"}


def test_a_linked_folder_of_another_rank_is_left_alone_by_overwrite(out, weight_path, tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    for name in ("rank_9_final.pth", "train.log"):
        (target / name).write_text("mine")
    (out / "rank_9").symlink_to(target)
    arguments = ("--weight_path", weight_path, *SWEEP, "--output_dir", "out", "--overwrite")
    assert rank_sweep_study.main([*map(str, arguments)]) == 0
    assert len(contents(target)) == 2


@pytest.mark.parametrize("name", ["train.log", "rank_10_final.pth"])
def test_a_folder_of_another_program_is_left_alone_by_overwrite(out, weight_path, name):
    (out / "rank_10").mkdir()
    (out / "rank_10" / name).write_text("mine")
    arguments = ("--weight_path", weight_path, *SWEEP, "--output_dir", "out", "--overwrite")
    assert rank_sweep_study.main([*map(str, arguments)]) == 0
    assert (out / "rank_10" / name).read_text() == "mine"


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_a_weight_inside_a_rank_folder_stays(out, weight_path, flags):
    (out / "rank_2").mkdir()
    weight = out / "rank_2" / "rank_2_best.pth"
    shutil.copy(weight_path, weight)
    before = weight.read_bytes()
    arguments = ("--weight_path", weight, *SWEEP, "--output_dir", "out", *flags)
    assert rank_sweep_study.main([*map(str, arguments)]) == 2
    assert weight.read_bytes() == before


@pytest.mark.parametrize("name", ["rank_sweep_floor.png", "rank_sweep_summary.csv", ".rank_sweep_samples_0.pth"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_an_output_of_the_users_stops_a_sweep(out, weight_path, name, flags):
    (out / name).write_text("mine")
    arguments = ("--weight_path", weight_path, *SWEEP, "--output_dir", "out", *flags)
    assert rank_sweep_study.main([*map(str, arguments)]) == 2
    assert contents(out) == {(out / name).relative_to(out): b"mine"}


@pytest.fixture
def study(out, weight_path):
    """A finished study in the output folder."""
    arguments = ("--weight_path", weight_path, *SWEEP, "--output_dir", "out")
    assert rank_sweep_study.main([*map(str, arguments)]) == 0
    return out


def test_a_second_prefix_in_the_folder_of_a_study_is_refused(study, weight_path, capsys):
    before = contents(study)
    arguments = ("--weight_path", weight_path, *SWEEP, "--output_dir", "out", "--save_prefix", "other")
    assert "holds the study of --save_prefix rank_sweep" in refused(rank_sweep_study.main, capsys, *arguments)
    assert contents(study) == before


def test_overwrite_with_a_second_prefix_leaves_nothing_of_the_first(study, weight_path):
    (study / "notes.txt").write_text("mine")
    arguments = ("--weight_path", weight_path, *SWEEP, "--output_dir", "out", "--save_prefix", "other", "--overwrite")
    assert rank_sweep_study.main([*map(str, arguments)]) == 0
    assert not list(study.glob("rank_sweep_*"))
    assert (study / "notes.txt").read_text() == "mine"
    assert (study / "other_summary.csv").exists()


def test_overwrite_with_a_second_prefix_deletes_nothing_through_a_link(study, weight_path, tmp_path):
    shutil.move(study / "rank_2", tmp_path / "moved")
    (study / "rank_2").symlink_to(tmp_path / "moved")
    before = contents(tmp_path / "moved")
    arguments = ("--weight_path", weight_path, *TRAIN, "--ranks", 3, "--jobs", 1, "--output_dir", "out")
    arguments += ("--save_prefix", "other", "--overwrite")
    assert rank_sweep_study.main([*map(str, arguments)]) == 0
    assert contents(tmp_path / "moved") == before


def test_an_output_folder_may_be_a_link_itself(out, weight_path, tmp_path):
    (tmp_path / "link").symlink_to(out)
    arguments = [*map(str, ("--weight_path", weight_path, *SWEEP, "--output_dir", "link"))]
    assert rank_sweep_study.main(arguments) == 0
    assert rank_sweep_study.main([*arguments, "--overwrite"]) == 0
    assert (out / "rank_2" / "rank_2_final.pth").exists()


def test_figures_of_another_study_are_not_replaced(study, tmp_path, weight_path, capsys):
    arguments = ("--weight_path", weight_path, *SWEEP, "--output_dir", "second")
    assert rank_sweep_study.main([*map(str, arguments)]) == 0
    capsys.readouterr()
    before = contents(study)
    line = refused(plot_rank_results.main, capsys, "--results_dir", "second", "--output_dir", "out")
    assert "is in the way" in line
    assert contents(study) == before
    for _ in range(2):
        assert plot_rank_results.main(["--results_dir", "second", "--output_dir", "figures"]) == 0
    assert plot_rank_results.main(["--results_dir", "out", "--formats", "svg"]) == 0


def test_a_damaged_record_of_a_run_does_not_keep_the_study_from_working(study, weight_path, capsys):
    (study / "rank_2" / "rank_2_config.json").write_text("{")
    arguments = ("--weight_path", weight_path, *SWEEP, "--output_dir", "out")
    assert rank_sweep_study.main([*map(str, arguments)]) == 0
    assert json.loads((study / "rank_2" / "rank_2_config.json").read_text())["files"]


@pytest.mark.parametrize("names", [["../victim"], ["/victim"], "victim"])
def test_a_record_that_names_files_elsewhere_deletes_nothing(study, weight_path, tmp_path, names):
    (tmp_path / "victim").write_text("mine")
    record = json.loads((study / "rank_sweep_config.json").read_text())
    names = [name.replace("/victim", str(tmp_path / "victim"), 1) if name == "/victim" else name for name in names]
    (study / "rank_sweep_config.json").write_text(json.dumps(record | {"files": names}))
    arguments = ("--weight_path", weight_path, *SWEEP, "--output_dir", "out", "--overwrite")
    rank_sweep_study.main([*map(str, arguments)])
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_demo_keeps_a_weight_of_the_users(out, capsys):
    torch.save(torch.ones(4, 4), out / "demo_weight.pth")
    before = contents(out)
    with pytest.raises(SystemExit) as raised:
        example_rank_sweep.main(["--output_dir", "out"])
    assert raised.value.code == 2
    assert contents(out) == before
