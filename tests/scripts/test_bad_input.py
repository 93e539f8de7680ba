"""Bad input: one clear line on stderr, exit code 2, nothing written."""

import importlib
import re
import sys

import pytest
import torch

RUNS = {
    "train_with_random": ["--output_dir", "out"],
    "rank_sweep_study": ["--output_dir", "out", "--ranks", "2", "4"],
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a script's main in tmp_path; returns its one line on stderr after checking exit code and folder."""
    monkeypatch.chdir(tmp_path)

    def call(script, *arguments):
        before = sorted(tmp_path.rglob("*"))
        try:
            code = importlib.import_module(script).main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse
            code = left.code
        assert code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert "error: " in lines[0]
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return call


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight_path", "absent.pth"], "absent.pth: no such file"),
        (["--weight_path", "."], "is a directory"),
        (["--weight_path", "several.pth"], "choose one by its key .--weight_key"),
        (["--weight_path", "several.pth", "--weight_key", "c"], "no key 'c'"),
        (["--weight_path", "zero.pth"], "all zero"),
        ([], "--weight_path"),
        (["--weight_path", "w.pth", "--num_samples", "20"], "16 training samples .* do not fill one batch of 32"),
        (
            ["--weight_path", "w.pth", "--sampling", "whitened", "--num_samples", "50", "--val_split", "0.7"],
            "--batch_size",
        ),
        (
            ["--weight_path", "wide.pth", "--sampling", "whitened", "--num_samples", "50"],
            "at least 64 training samples",
        ),
        (["--weight_path", "w.pth", "--row_splits", "4", "3", "--col_splits", "4", "6"], "multiply to 12"),
        (["--weight_path", "w.pth", "--row_splits", "4", "4"], "go together"),
        (
            ["--weight_path", "w.pth", "--chain", "monarch", "--row_splits", "4", "4", "--col_splits", "4", "6"],
            "one or",
        ),
        (["--weight_path", "w.pth", "--chain", "butterfly", "--num_factors", "6"], "or the chain monarch"),
        (["--weight_path", "w.pth", "--chain", "lowrank_butterfly", "--init", "hierarchical"], "use --init random"),
        (["--weight_path", "w.pth", "--impl", "triton"], "need a CUDA device"),
        (["--weight_path", "w.pth", "--device", "cuda"], "0 CUDA devices"),
        (["--weight_path", "w.pth", "--device", "abacus"], "auto, cpu, cuda"),
        (["--weight_path", "w.pth", "--lr", "0"], "not a number from 1e-100 to 1e.100"),
        (["--weight_path", "w.pth", "--dtype", "int8"], "invalid choice"),
        (["--weight_path", "w.pth", "--save_prefix", "a/b"], "not a file name prefix"),
        (["--weight_path", "w.pth", "--output_dir", "w.pth"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value[2:] or value) if isinstance(value, list) else "",
)
def test_training_and_sweep(refused, tmp_path, script, arguments, message):
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("this machine has CUDA")
    torch.save(torch.randn(16, 24), tmp_path / "w.pth")
    torch.save(torch.randn(8, 64), tmp_path / "wide.pth")
    torch.save(torch.zeros(8, 8), tmp_path / "zero.pth")
    torch.save({"a": torch.randn(2, 3), "b": torch.randn(3, 2)}, tmp_path / "several.pth")
    line = refused(script, *RUNS[script], *arguments)
    assert re.search(message, line), line


def test_an_empty_rank_list(refused, weight_path):
    line = refused("rank_sweep_study", "--weight_path", weight_path, "--ranks", 8, 16, "--max_rank", 4)
    assert "no rank is left: --max_rank 4 excludes all of 8 16" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0: the device is cpu"),
        (["--jobs", "0"], "'0' is not a whole number from 1 to 2147483647"),
        (["--launcher", "slurm"], "invalid choice"),
        (["--launcher", "ray", "--gpus", "0"], "chooses GPUs itself"),
        (["--launcher", "ray"], "pip install -r requirements-ray.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_places(refused, weight_path, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "ray", None)  # not installed
    assert message in refused("rank_sweep_study", "--weight_path", weight_path, "--device", "cpu", *arguments)


@pytest.mark.parametrize("script", RUNS)
def test_a_tracker_that_is_not_installed(refused, weight_path, monkeypatch, script):
    monkeypatch.setitem(sys.modules, "trackio", None)
    line = refused(script, *RUNS[script], "--weight_path", weight_path, "--log_to", "trackio")
    assert line.endswith("--log_to trackio needs the package trackio; install it: pip install trackio")


def test_folders_of_something_else(refused, weight_path, tmp_path):
    (tmp_path / "out" / "rank_2").mkdir(parents=True)
    (tmp_path / "out" / "rank_2" / "rank_2_rank_2_loss_curves.csv").write_text(
        "epoch,train_loss,val_loss,rank\n1,2,3,2\n"
    )
    line = refused("rank_sweep_study", "--weight_path", weight_path, "--output_dir", "out")
    assert "holds results of something else" in line


LOCKS = {"train_with_random": ".ks_chain.lock", "rank_sweep_study": ".sweep.lock"}


@pytest.mark.parametrize("script", LOCKS)
def test_a_lock_that_is_a_link_or_a_folder(refused, weight_path, tmp_path, script):
    lock = tmp_path / "out" / LOCKS[script]
    lock.parent.mkdir()
    (tmp_path / "precious").write_text("content")
    lock.symlink_to(tmp_path / "precious")
    line = refused(script, "--weight_path", weight_path, "--output_dir", "out")
    assert re.search(rf"lock file {lock} cannot be opened \(.+\); remove it", line)
    assert (tmp_path / "precious").read_text() == "content"
    lock.unlink()
    lock.mkdir()
    line = refused(script, "--weight_path", weight_path, "--output_dir", "out")
    assert f"lock file {lock} cannot be opened (Is a directory); remove it" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such folder"), ("", "holds no results"), ("a,b\n1,2\n", "lacks the columns"), ("half", "line 2")],
)
def test_plotting(refused, tmp_path, content, message):
    if content is not None:
        (tmp_path / "results" / "rank_2").mkdir(parents=True)
    if content:
        header = "epoch,train_loss,val_loss,rank\n1,0.5,zwei,2\n" if content == "half" else content
        (tmp_path / "results" / "rank_2" / "rank_2_rank_2_loss_curves.csv").write_text(header)
    assert message in refused("plot_rank_results", "--results_dir", "results")


def test_comparing(refused, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_sweep_summary.json").write_text('[{"rank": 2, "status": "ok", "final_val_loss": 1.0}]')
        (tmp_path / name / "rank_sweep_config.json").write_text(
            f'{{"settings": {{}}, "ranks": [2], "seeds": [0], "problem": {{"weight": {{"sha256": "{name}"}}}}}}'
        )
    assert "--output_dir" in refused("plot_rank_results", "--results_dir", "a", "b")
    line = refused("plot_rank_results", "--results_dir", "a", "b", "--output_dir", "c")
    assert "different weights" in line
    assert "--save_prefix: rank_sweep" in refused("plot_rank_results", "--results_dir", "a", "--save_prefix", "mine")


def test_generating(refused, tmp_path):
    size = ("--output_features", 8, "--input_features", 8)
    assert "suffix '.txt'" in refused("generate_test_weight", *size, "--output_path", "w.txt")
    assert "no bfloat16" in refused("generate_test_weight", *size, "--output_path", "w.npy", "--dtype", "bfloat16")
    assert "is a directory" in refused("generate_test_weight", *size, "--output_path", tmp_path)
    line = refused("generate_test_weight", *size, "--output_path", "w.pth", "--init_method", "magic")
    assert "invalid choice" in line


LONG = "a" * 300


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train_with_random", ["--weight_path", f"{LONG}.pth"]),
        ("rank_sweep_study", ["--weight_path", f"{LONG}.pth"]),
        ("plot_rank_results", ["--results_dir", LONG]),
        ("generate_test_weight", ["--output_features", 4, "--input_features", 4, "--output_path", f"{LONG}.pth"]),
        ("train_with_random", ["--weight_path", "weight.pth", "--output_dir", LONG]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_paths_that_the_system_refuses(refused, weight_path, script, arguments):
    """A name that is too long stands for every such path, also one in a folder that is closed to this user."""
    assert re.search(f"{LONG}.* cannot be (read|written): File name too long", refused(script, *arguments))
