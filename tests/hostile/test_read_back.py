"""Files that are read back and hold something else: refused in a line, or ignored with the reason and trained again."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICK as SWEEP
from conftest import files_of, interrupt_in_epoch
from folders import call, make_fifo, make_folder, refused, snapshot, train

import ks
import plot_rank_results
from ks.errors import UsageError
from ks.files.layout import RunFiles, SweepFiles
from ks.files.status import Ending, Status
from ks.study.processes import Task
from ks.study.runs import Run, result_of

pytestmark = pytest.mark.usefixtures("no_hang")
EPOCHS = 3


# The results folder of a sweep, read by the plot.


@pytest.fixture
def study(swept, tmp_path) -> SweepFiles:
    """A copy of a small finished sweep of ranks 2, 4 and 100."""
    shutil.copytree(swept[0] / "rank_sweep_results", tmp_path / "study")
    return SweepFiles(tmp_path / "study", "rank_sweep")


DEEP = "[" * 100_000 + "]" * 100_000
SUMMARIES = {
    "a number": "7",
    "rows without rank": '[{"status": "ok"}]',
    "rank a fraction": '[{"rank": 2.5, "status": "ok"}]',
    "rank 10**30": '[{"rank": 1' + "0" * 30 + ', "status": "ok"}]',
    "status of 20 kB": f'[{{"rank": 2, "status": "{"x" * 20_000}"}}]',
    "loss 1e308": '[{"rank": 2, "status": "ok", "final_val_loss": 1e308}]',
    "loss NaN": '[{"rank": 2, "status": "ok", "final_val_loss": NaN}]',
    "metric a text": '[{"rank": 2, "status": "ok", "final_r2": "good"}]',
    "nested deep": DEEP,
    "half": '[{"rank": 2, "sta',
    "not text": b"\xff\xfe\x00\x80",
}
STUDY = '{"settings": {}, "ranks": [2], "seeds": [0], '
CONFIGS = {
    "a list": "[1, 2]",
    "weight a text": '{"settings": {}, "ranks": [2], "seeds": [0], "problem": {"weight": "w"}}',
    "seeds a number": '{"settings": {}, "ranks": [2], "seeds": 0}',
    "shape of one": STUDY + '"problem": {"weight": {"shape": [3]}}}',
    "zero predictor 0": STUDY + '"problem": {"predict_zero_loss": 0}}',
    "nested deep": f'{{"settings": {{"a": {DEEP}}}, "ranks": [2], "seeds": [0]}}',
    "not text": b"\xff\xfe\x00\x80",
}
HEADER = "epoch,train_loss,val_loss,rank\n"
CURVES = {
    "epoch inf": HEADER + "inf,1,1,2\n",
    "epoch 0": HEADER + "0,1,1,2\n",
    "rank of another folder": HEADER + "1,1,1,4\n",
    "cell of 200 kB": HEADER + f"1,{'7' * 200_000},1,2\n",
    "loss 1e308": HEADER + "1,1e308,1,2\n",
    "metric a text": "epoch,train_loss,val_loss,rank,r2\n1,1,1,2,good\n",
    "more cells than columns": HEADER + "1,1,1,2,5,6\n",
    "other columns": "a,b\n1,2\n",
    "not text": b"\xff\xfe\x00\x80",
}
FLOORS = {
    "other columns": "a,b\n1,2\n",
    "loss a text": "chain,rank,parameters,loss_floor,relative_loss\nmonarch,2,40,small,0.5\n",
    "empty cells": "chain,rank,parameters,loss_floor,relative_loss\nmonarch,,,,\n",
}
RUNS = {
    "rank a text": "rank,seed,status\ntwo,0,ok\n",
    "seed empty": "rank,seed,status\n2,,ok\n",
}
READ_BY_PLOT = {
    "summary": (lambda files: files.summary_json, SUMMARIES),
    "config": (lambda files: files.config, CONFIGS),
    "curves": (lambda files: files.directory / "rank_2" / "rank_2_rank_2_loss_curves.csv", CURVES),
    "floor": (lambda files: files.floor_csv, FLOORS),
    "runs": (lambda files: files.runs_csv, RUNS),
}


def put(path: Path, content) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("kind", "damage"), [(kind, damage) for kind, (_, cases) in READ_BY_PLOT.items() for damage in cases]
)
def test_the_plot_refuses_a_file_that_is_not_valid_in_one_line_with_its_path(study, capsys, kind, damage):
    path_of, cases = READ_BY_PLOT[kind]
    path = path_of(study)
    put(path, cases[damage])
    line = refused(plot_rank_results.main, ["--results_dir", study.directory], capsys, study.directory)
    assert str(path) in line
    assert len(line) < 1000


@pytest.mark.parametrize(("kind", "make"), [("summary", make_fifo), ("config", make_folder)])
def test_the_plot_refuses_what_is_no_regular_file(study, capsys, kind, make):
    path = READ_BY_PLOT[kind][0](study)
    make(path)
    line = refused(plot_rank_results.main, ["--results_dir", study.directory], capsys, study.directory)
    assert f"{path} cannot be read: it is no regular file" in line


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize(("kind", "make"), [("curves", make_fifo), ("floor", make_folder), ("runs", make_fifo)])
def test_the_plot_does_without_a_table_that_is_no_regular_file(study, kind, make):
    make(READ_BY_PLOT[kind][0](study))
    assert call(plot_rank_results.main, "--results_dir", study.directory) == 0


DRAWN = {
    "status with mathtext": {"status": r"failed ($\frac$)", "final_val_loss": None, "num_seeds": 0},
    "every value null": dict.fromkeys(("final_train_loss", "final_val_loss", "parameters", "loss_floor", "num_seeds")),
    "losses 0": {"final_train_loss": 0.0, "final_val_loss": 0.0, "population_loss": 0.0, "relative_loss": 0.0},
    "losses 1e300": dict.fromkeys(("final_train_loss", "final_val_loss", "population_loss", "relative_loss"), 1e300),
    "floor 0": {"loss_floor": 0.0, "population_loss": 0.0},
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("values", DRAWN)
def test_the_plot_draws_what_is_valid_but_unusual(study, values):
    rows = json.loads(study.summary_json.read_text())
    rows[0] |= DRAWN[values]
    study.summary_json.write_text(json.dumps(rows))
    assert call(plot_rank_results.main, "--results_dir", study.directory, "--log_scale") == 0


@pytest.mark.usefixtures("blank_pictures")
def test_a_seed_of_63_bits_is_read_back(study):
    config = json.loads(study.config.read_text())
    study.config.write_text(json.dumps(config | {"seeds": [2**63 - 1]}))
    study.runs_csv.write_text(study.runs_csv.read_text().replace(",0,", f",{2**63 - 1},", 1))
    assert call(plot_rank_results.main, "--results_dir", study.directory) == 0


# The files of a run, read when it is run again.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a weight and a finished run of it; no test changes it."""
    folder = tmp_path_factory.mktemp("trained")
    torch.save(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), folder / "weight.pth")
    assert train(folder / "weight.pth", folder / "out", "--save_prefix", "rank_2") == 0
    return folder


@pytest.fixture(scope="module")
def stopped(trained) -> Path:
    """Another run on the same weight, interrupted after two epochs; it left a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in_epoch(patch, 2)
        assert train(trained / "weight.pth", trained / "stopped", "--save_prefix", "rank_2") == 130
    assert (trained / "stopped" / "rank_2_resume.pth").exists()
    return trained / "stopped"


def copied(source: Path, tmp_path: Path) -> RunFiles:
    shutil.copytree(source, tmp_path / "rank_2")
    return RunFiles(tmp_path / "rank_2", "rank_2", 2)


def assert_same_result(files: RunFiles, trained: Path) -> None:
    """The run has the result of the one that nothing happened to, to the bit."""
    whole = RunFiles(trained / "out", "rank_2", 2)
    for name in ("final", "best"):
        assert torch.equal(ks.load(getattr(files, name)).to_dense(), ks.load(getattr(whole, name)).to_dense())
    assert json.loads(files.training_log.read_text())["status"] == "ok"


def edit_json(change):
    def edit(path: Path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def edit_saved(change):
    def edit(path: Path):
        content = torch.load(path, weights_only=True)
        torch.save(change(content), path)

    return edit


def without(name):
    return edit_saved(lambda content: {key: value for key, value in content.items() if key != name})


def with_(**values):
    return edit_saved(lambda content: content | values)


def edit_state(change):
    return edit_saved(lambda saved: saved | {"state_dict": change(saved["state_dict"])})


def lower_population_loss(path: Path) -> None:
    lines = path.read_text().splitlines()
    place = lines[0].split(",").index("population_loss")
    cells = lines[-1].split(",")
    cells[place] = "1e-9"
    path.write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")


CHAINS = {
    "version -1": with_(version=-1),
    "no patterns": without("patterns"),
    "patterns of 3 numbers": with_(patterns=[[1, 1, 1]]),
    "patterns of 14 GB": with_(patterns=[[1, 60000, 60000, 1]]),
    "patterns that do not chain": with_(patterns=[[1, 2, 3, 1], [1, 2, 3, 1]]),
    "patterns of another weight": with_(patterns=[[4, 4, 2, 1], [1, 8, 6, 1]]),
    "2000 patterns": with_(patterns=[[1, 1, 1, 1]] * 2000),
    "batch_last a text": with_(batch_last="yes"),
    "factors of other shapes": edit_state(lambda state: {name: value[:1] for name, value in state.items()}),
    "factors of integers": edit_state(lambda state: {name: value.int() for name, value in state.items()}),
    "sparse factors": edit_state(lambda state: {name: value.to_sparse() for name, value in state.items()}),
    "a factor too many": edit_state(lambda state: state | {"factors.7": torch.ones(1)}),
    "bias of another length": edit_state(lambda state: state | {"bias": torch.ones(5)}),
    "another format": with_(format="pickle"),
    "a tensor": edit_saved(lambda saved: torch.ones(3)),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "a FIFO": make_fifo,
}


@pytest.mark.parametrize("damage", CHAINS)
def test_load_refuses_what_is_no_saved_chain_in_one_line_with_its_path(trained, tmp_path, monkeypatch, damage):
    files = copied(trained / "out", tmp_path)
    CHAINS[damage](files.final)
    monkeypatch.setattr(ks.layer, "empty_blocks", lambda *place: pytest.fail("allocated"))
    with pytest.raises(UsageError) as raised:
        ks.load(files.final)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


FINISHED = {
    "final: keys missing": ("final", without("patterns")),
    "final: missing": ("final", Path.unlink),
    "final: a FIFO": ("final", make_fifo),
    "best: no factors": ("best", with_(state_dict={})),
    "log: train_seconds a text": ("training_log", edit_json(lambda log: log.update(train_seconds="long"))),
    "log: nested deep": ("training_log", lambda path: path.write_text(DEEP)),
    "curves: another rank": ("curves_csv", lambda path: path.write_text(path.read_text().replace(",2,", ",4,"))),
    "curves: below the floor": ("curves_csv", lower_population_loss),
    "curves: missing": ("curves_csv", Path.unlink),
    "curves: a FIFO": ("curves_csv", make_fifo),
    "curves JSON: a list": ("curves_json", lambda path: path.write_text("[1]")),
}


@pytest.mark.parametrize("damage", FINISHED)
def test_a_sweep_does_not_count_a_damaged_run_as_finished_and_says_why(trained, tmp_path, capsys, damage):
    files = copied(trained / "out", tmp_path)
    run = Run(2, 0, files, Task("rank 2", [], files.log))
    assert result_of(run, EPOCHS).ending == Ending(Status.OK)
    name, edit = FINISHED[damage]
    edit(getattr(files, name))
    assert result_of(run, EPOCHS).ending.status is Status.INTERRUPTED
    (line,) = capsys.readouterr().err.splitlines()
    assert str(files.directory) in line
    assert line.endswith("; rank 2 is trained again")


def is_fifo(damage):
    return damage.endswith("a FIFO")


def assert_refused(trained, files, path, capsys):
    """What is in the place of a file of ours is the user's: a run refuses in one line and changes nothing."""
    before = snapshot(files.directory)
    assert train(trained / "weight.pth", files.directory, "--save_prefix", "rank_2", "--resume") == 2
    assert f"{path} is in the way" in capsys.readouterr().err.splitlines()[-1]
    assert snapshot(files.directory) == before


@pytest.mark.parametrize("damage", [*filter(is_fifo, FINISHED)])
def test_a_fifo_in_the_place_of_a_result_is_refused(trained, tmp_path, capsys, damage):
    files = copied(trained / "out", tmp_path)
    name, edit = FINISHED[damage]
    edit(getattr(files, name))
    assert_refused(trained, files, getattr(files, name), capsys)


@pytest.mark.parametrize("damage", [*itertools.filterfalse(is_fifo, FINISHED)])
def test_a_damaged_run_is_trained_again(trained, tmp_path, capsys, damage):
    files = copied(trained / "out", tmp_path)
    name, edit = FINISHED[damage]
    edit(getattr(files, name))
    assert train(trained / "weight.pth", files.directory, "--save_prefix", "rank_2", "--resume") == 0
    assert str(files.directory) in capsys.readouterr().err
    assert_same_result(files, trained)


RUN_CONFIGS = {
    "a list": lambda path: path.write_text("[1]"),
    "nested deep": lambda path: path.write_text(DEEP),
    "a FIFO": make_fifo,
}


@pytest.mark.parametrize("damage", RUN_CONFIGS)
def test_results_whose_record_is_lost_are_the_users(trained, tmp_path, capsys, damage):
    files = copied(trained / "out", tmp_path)
    RUN_CONFIGS[damage](files.config)
    before = snapshot(files.directory)
    assert train(trained / "weight.pth", files.directory, "--save_prefix", "rank_2", "--resume") == 2
    assert "no record lists it as the toolkit's" in capsys.readouterr().err.splitlines()[-1]
    assert snapshot(files.directory) == before


def test_a_run_whose_damaged_record_still_names_its_files_is_trained_again(trained, tmp_path, capsys):
    files = copied(trained / "out", tmp_path)
    edit_json(lambda config: config.update(settings=[1]))(files.config)
    assert train(trained / "weight.pth", files.directory, "--save_prefix", "rank_2", "--resume") == 0
    err = capsys.readouterr().err
    assert str(files.config) in err
    assert "training starts anew" in err
    assert_same_result(files, trained)


def best_with(**values):
    return edit_saved(lambda content: content | {"best": content["best"] | values})


def first_row_with(**values):
    return edit_saved(lambda content: content | {"curves": [content["curves"][0] | values]})


CHECKPOINTS = {
    "a list": edit_saved(lambda content: [content]),
    "no best": without("best"),
    "settings with a tensor": edit_saved(lambda c: c | {"settings": c["settings"] | {"lr": torch.ones(2)}}),
    "threads 0": with_(threads=0),
    "curves empty": with_(curves=[]),
    "curves with a loss of text": first_row_with(val_loss="small"),
    "curves from epoch 5": first_row_with(epoch=5),
    "curves with a metric of tensors": first_row_with(r2=torch.ones(2)),
    "optimizer of other shapes": edit_saved(lambda c: c | {"optimizer": [torch.ones(3) for _ in c["optimizer"]]}),
    "optimizer of sparse tensors": edit_saved(
        lambda c: c | {"optimizer": [value.to_sparse() if value.ndim else value for value in c["optimizer"]]}
    ),
    "best of other shapes": best_with(factors=[torch.ones(3)]),
    "best of epoch 9": best_with(epoch=9),
    "best of loss nan": best_with(val_loss=math.nan),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "a FIFO": make_fifo,
}


def test_a_fifo_in_the_place_of_a_checkpoint_is_refused(trained, stopped, tmp_path, capsys):
    files = copied(stopped, tmp_path)
    make_fifo(files.resume)
    assert_refused(trained, files, files.resume, capsys)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("damage", [*itertools.filterfalse(is_fifo, CHECKPOINTS)])
def test_a_checkpoint_that_is_not_valid_is_ignored_and_the_rank_trained_again(
    trained, stopped, tmp_path, capsys, damage
):
    files = copied(stopped, tmp_path)
    CHECKPOINTS[damage](files.resume)
    assert train(trained / "weight.pth", files.directory, "--save_prefix", "rank_2", "--resume") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if str(files.resume) in line]
    assert len(lines) == 1
    assert lines[0].endswith(("training starts anew", "starting anew"))
    assert_same_result(files, trained)


def test_the_checkpoint_is_resumed_from_as_it_was(trained, stopped, tmp_path, capsys):
    files = copied(stopped, tmp_path)
    before = snapshot(trained)
    assert train(trained / "weight.pth", files.directory, "--save_prefix", "rank_2", "--resume") == 0
    assert "anew" not in capsys.readouterr().err
    assert_same_result(files, trained)
    assert snapshot(trained) == before


def test_metrics_of_earlier_epochs_survive_a_resume(trained, stopped, tmp_path):
    files = copied(stopped, tmp_path)
    first_row_with(**{"r2": 0.1, "top-5": None, "cosine": math.nan})(files.resume)
    assert train(trained / "weight.pth", files.directory, "--save_prefix", "rank_2", "--resume") == 0
    assert_same_result(files, trained)
    lists = json.loads(files.curves_json.read_text())
    assert [lists[name] for name in ("r2", "top-5", "cosine")] == [[0.1, None, None], [None] * 3, [None] * 3]


def test_counting_the_epochs_of_a_fifo_does_not_block(tmp_path):
    from ks.files.curves import CurvesTail

    os.mkfifo(tmp_path / "curves.csv")
    tail = CurvesTail(tmp_path / "curves.csv")
    tail.update()
    assert tail.epochs == 0


def test_a_sweep_trains_a_damaged_rank_again_and_keeps_the_other(swept, tmp_path, run):
    """Rank 2 has a final model without patterns and a checkpoint of another program."""
    shutil.copytree(swept[0], tmp_path, dirs_exist_ok=True)
    results = tmp_path / "rank_sweep_results"
    before = ks.load(files_of(results, 2).final).to_dense()
    without("patterns")(files_of(results, 2).final)
    torch.save([1, 2], files_of(results, 2).resume)
    kept = snapshot(results / "rank_4")
    done = run("rank_sweep_study.py", "--weight_path", "weight.pth", *SWEEP, "--ranks", "4", "2")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "rank 4: finished before" in done.stderr
    assert f"saved chain {files_of(results, 2).final} is not valid" in done.stderr
    assert torch.equal(ks.load(files_of(results, 2).final).to_dense(), before)
    assert snapshot(results / "rank_4") == kept
