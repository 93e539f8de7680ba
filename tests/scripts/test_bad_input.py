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
    """Run a script's main in tmp_path; return its one line on stderr after checking exit code and folder."""
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


WHITENED = ["--sampling", "whitened", "--num_samples", "50"]


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        ("absent", [], "absent.pth: no such file"),
        ("several", [], "choose one by its key .--weight_key"),
        ("w", ["--num_samples", "20"], "16 training samples .* do not fill one batch of 32"),
        ("w", [*WHITENED, "--val_split", "0.7"], "--batch_size"),
        ("wide", WHITENED, "at least 64 training samples"),
        ("w", ["--row_splits", "4", "3", "--col_splits", "4", "6"], "multiply to 12"),
        ("w", ["--row_splits", "4", "4"], "go together"),
        ("w", ["--chain", "monarch", "--row_splits", "4", "4", "--col_splits", "4", "6"], "one or"),
        ("w", ["--chain", "butterfly", "--num_factors", "6"], "or the chain monarch"),
        ("w", ["--chain", "lowrank_butterfly", "--init", "hierarchical"], "use --init random"),
        ("w", ["--impl", "triton"], "need a CUDA device"),
        ("w", ["--device", "cuda"], "0 CUDA devices"),
        ("w", ["--device", "abacus"], "auto, cpu, cuda"),
        ("w", ["--output_dir", "w.pth"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_and_sweep(refused, tmp_path, script, weight, arguments, message):
    if torch.cuda.is_available() and arguments[1:] in (["cuda"], ["triton"]):
        pytest.skip("this machine has CUDA")
    torch.save(torch.randn(16, 24), tmp_path / "w.pth")
    torch.save(torch.randn(8, 64), tmp_path / "wide.pth")
    torch.save({"a": torch.randn(2, 3), "b": torch.randn(3, 2)}, tmp_path / "several.pth")
    line = refused(script, "--weight_path", f"{weight}.pth", *RUNS[script], *arguments)
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "8", "16", "--max_rank", "4"], "no rank is left: --max_rank 4 excludes all of 8 16"),
        (["--gpus", "0"], "--gpus 0: the device is cpu"),
        (["--launcher", "ray", "--gpus", "0"], "chooses GPUs itself"),
        (["--launcher", "ray"], "pip install -r requirements-ray.txt"),
        (["--log_to", "trackio"], "pip install trackio"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_sweep(refused, weight_path, monkeypatch, arguments, message):
    for package in ("ray", "trackio"):  # not installed
        monkeypatch.setitem(sys.modules, package, None)
    assert message in refused("rank_sweep_study", "--weight_path", weight_path, "--device", "cpu", *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such folder"), ("", "holds no results"), ("a,b\n1,2\n", "lacks the columns")],
)
def test_plotting(refused, tmp_path, content, message):
    if content is not None:
        (tmp_path / "results" / "rank_2").mkdir(parents=True)
    if content:
        (tmp_path / "results" / "rank_2" / "rank_2_rank_2_loss_curves.csv").write_text(content)
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
    assert "no relative losses" in line
    assert "--save_prefix: rank_sweep" in refused("plot_rank_results", "--results_dir", "a", "--save_prefix", "mine")


LONG = "a" * 300


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
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
