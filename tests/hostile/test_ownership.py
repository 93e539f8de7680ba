"""Only files that a record names as ours are overwritten or deleted; the user's stay, byte for byte."""

import json
import shutil

import pytest
import torch
from folders import call, refused, snapshot

import example_rank_sweep
import plot_rank_results
import rank_sweep_study
import train_with_random

TRAIN = ("--num_samples", "80", "--batch_size", "16", "--num_epochs", "2", "--quiet")
SWEEP = (*TRAIN, "--ranks", "2", "--jobs", "1", "--output_dir", "out")
pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An output folder; the working directory is the one above."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def sweep(weight, *arguments) -> int:
    return call(rank_sweep_study.main, "--weight_path", weight, *SWEEP, *arguments)


PREFIX = ("--output_dir", "out", "--save_prefix", "model")


@pytest.mark.parametrize("name", ["best.pth", "config.json", "rank_4_loss_curves.csv"])
def test_a_file_of_the_users_with_a_name_of_ours_stops_a_run(out, weight_path, capsys, name):
    (out / f"model_{name}").write_text("mine")
    line = refused(train_with_random.main, ["--weight_path", weight_path, *TRAIN, *PREFIX], capsys, out)
    assert f"model_{name} is in the way" in line


def test_an_epoch_checkpoint_of_the_users_stops_a_run_that_would_write_some(out, weight_path, capsys):
    (out / "model_epoch_1.pth").write_text("mine")
    arguments = ["--weight_path", weight_path, *TRAIN, *PREFIX, "--save_interval"]
    line = refused(train_with_random.main, [*arguments, 1], capsys, out)
    assert "model_epoch_1.pth is in the way" in line
    for _ in range(2):
        assert call(train_with_random.main, *arguments, 0) == 0
    assert (out / "model_epoch_1.pth").read_text() == "mine"


@pytest.mark.parametrize("name", ["model_best.pth", "model_final.pth"])
def test_the_weight_itself_is_never_overwritten(out, weight_path, capsys, name):
    shutil.copy(weight_path, out / name)
    refused(train_with_random.main, ["--weight_path", out / name, *TRAIN, *PREFIX], capsys, out)


def test_a_rerun_replaces_its_own_files_and_leaves_the_rest(out, weight_path):
    arguments = ["--weight_path", weight_path, *TRAIN, *PREFIX, "--save_interval", 1]
    assert call(train_with_random.main, *arguments) == 0
    (out / "notes.txt").write_text("mine")
    (out / "model_notes.pth").write_text("mine")
    assert call(train_with_random.main, *arguments, "--rank", 2) == 0
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
    refused(rank_sweep_study.main, ["--weight_path", weight_path, *SWEEP, "--seeds", 0, 1, *flags], capsys, tmp_path)


def test_folders_of_other_programs_and_linked_ones_are_left_alone_by_overwrite(out, weight_path, tmp_path):
    for folder in (tmp_path / "elsewhere", out / "rank_10"):
        folder.mkdir()
        for name in ("rank_9_final.pth", "rank_10_final.pth", "train.log"):
            (folder / name).write_text("mine")
    (out / "rank_9").symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere") | snapshot(out / "rank_10")
    assert sweep(weight_path, "--overwrite") == 0
    assert snapshot(tmp_path / "elsewhere") | snapshot(out / "rank_10") == before


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_a_weight_inside_a_rank_folder_stays(out, weight_path, capsys, flags):
    (out / "rank_2").mkdir()
    weight = out / "rank_2" / "rank_2_best.pth"
    shutil.copy(weight_path, weight)
    refused(rank_sweep_study.main, ["--weight_path", weight, *SWEEP, *flags], capsys, out)


@pytest.mark.parametrize("name", ["rank_sweep_floor.png", "rank_sweep_summary.csv", ".rank_sweep_samples_0.pth"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_an_output_of_the_users_stops_a_sweep(out, weight_path, capsys, name, flags):
    (out / name).write_text("mine")
    refused(rank_sweep_study.main, ["--weight_path", weight_path, *SWEEP, *flags], capsys, out)


@pytest.fixture
def study(out, weight_path):
    """A finished study in the output folder."""
    assert sweep(weight_path) == 0
    return out


def test_a_second_prefix_in_the_folder_of_a_study_is_refused(study, weight_path, capsys):
    arguments = ["--weight_path", weight_path, *SWEEP, "--save_prefix", "other"]
    line = refused(rank_sweep_study.main, arguments, capsys, study)
    assert "holds the study of --save_prefix rank_sweep" in line


def test_overwrite_with_a_second_prefix_leaves_nothing_of_the_first(study, weight_path):
    (study / "notes.txt").write_text("mine")
    assert sweep(weight_path, "--save_prefix", "other", "--overwrite") == 0
    assert not list(study.glob("rank_sweep_*"))
    assert (study / "notes.txt").read_text() == "mine"
    assert (study / "other_summary.csv").exists()


def test_overwrite_with_a_second_prefix_deletes_nothing_through_a_link(study, weight_path, tmp_path):
    shutil.move(study / "rank_2", tmp_path / "moved")
    (study / "rank_2").symlink_to(tmp_path / "moved")
    before = snapshot(tmp_path / "moved")
    assert sweep(weight_path, "--ranks", 3, "--save_prefix", "other", "--overwrite") == 0
    assert snapshot(tmp_path / "moved") == before


def test_an_output_folder_may_be_a_link_itself(out, weight_path, tmp_path):
    (tmp_path / "link").symlink_to(out)
    for flags in ((), ("--overwrite",)):
        assert sweep(weight_path, "--output_dir", "link", *flags) == 0
    assert (out / "rank_2" / "rank_2_final.pth").exists()


def test_figures_of_another_study_are_not_replaced(study, tmp_path, weight_path, capsys):
    assert sweep(weight_path, "--output_dir", "second") == 0
    line = refused(plot_rank_results.main, ["--results_dir", "second", "--output_dir", "out"], capsys, study)
    assert "is in the way" in line
    for _ in range(2):
        assert plot_rank_results.main(["--results_dir", "second", "--output_dir", "figures"]) == 0
    assert plot_rank_results.main(["--results_dir", "out", "--formats", "svg"]) == 0


def test_a_study_repairs_the_damaged_record_of_a_run(study, weight_path, capsys):
    (study / "rank_2" / "rank_2_config.json").write_text("{")
    assert sweep(weight_path) == 0
    assert json.loads((study / "rank_2" / "rank_2_config.json").read_text())["files"]


@pytest.mark.parametrize("names", [["../victim"], ["/victim"], "victim"])
def test_a_record_that_names_files_elsewhere_deletes_nothing(study, weight_path, tmp_path, names):
    (tmp_path / "victim").write_text("mine")
    record = json.loads((study / "rank_sweep_config.json").read_text())
    names = [name.replace("/victim", str(tmp_path / "victim"), 1) if name == "/victim" else name for name in names]
    (study / "rank_sweep_config.json").write_text(json.dumps(record | {"files": names}))
    sweep(weight_path, "--overwrite")
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_demo_keeps_a_weight_of_the_users(out, capsys):
    torch.save(torch.ones(4, 4), out / "demo_weight.pth")
    before = snapshot(out)
    assert call(example_rank_sweep.main, "--output_dir", "out") == 2
    assert snapshot(out) == before
