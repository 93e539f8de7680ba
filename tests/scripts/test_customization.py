"""An edited criterion or edited metrics: they train, identify the study, and appear in its files."""

import json
import math
import re
import shlex
import shutil

import pytest
import torch
from conftest import QUICK, files_of, interrupt_in_epoch, read_table
from torch.nn import functional

import ks
from ks.cli.flags import TrainerConfig
from ks.cli.parser import Parser
from ks.files.curves import read_curves
from ks.training.problem import resolve
from ks.training.samples import make_samples

L1 = "criterion = torch.nn.functional.l1_loss"
EVEN_ROWS = "def criterion(prediction, target):\n    return (prediction - target)[:, ::2].square().mean()\n"
METRICS = (
    "    cosine = torch.nn.functional.cosine_similarity(prediction, target).mean()\n"
    "    return {'cosine': cosine, 'worst_row': (prediction - target).square().mean(0).max()}"
)


def train(script, weight_path, folder, *flags, code=0):
    arguments = ["--weight_path", weight_path, *QUICK, "--output_dir", folder, *flags]
    assert script.main([*map(str, arguments)]) == code
    return folder


def curves_of(folder, rank=4):
    return read_curves(folder / f"ks_chain_rank_{rank}_loss_curves.csv")


@pytest.mark.parametrize("layout", [(), ("--bs_last",)], ids=["batch first", "features first"])
def test_rows_that_the_criterion_leaves_out_stay_at_zero_in_the_saved_chain(edited, weight_path, tmp_path, layout):
    folder = train(edited(criterion=EVEN_ROWS), weight_path, tmp_path / "out", *layout)
    norms = ks.load(folder / "ks_chain_final.pth").to_dense().norm(dim=1)
    assert (norms[::2] > 0).all()
    assert (norms[1::2] == 0).all()


def test_a_run_notes_another_criterion_once_and_reports_its_loss_alone(edited, weight_path, tmp_path, capsys):
    folder = train(edited(criterion=L1), weight_path, tmp_path / "out")
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "criterion" in line]
    assert re.match(
        r"criterion torch\.nn\.functional\.l1_loss of torch [\d.]+: adamw trains; floors, exact losses", line
    )
    assert "relative loss" not in printed.out
    config = json.loads((folder / "ks_chain_config.json").read_text())
    assert config["settings"]["optimizer"] == config["problem"]["optimizer"] == "adamw"
    assert config["settings"]["criterion"] == line.split(":")[0].removeprefix("criterion ")
    assert all(math.isnan(row["population_loss"]) for row in curves_of(folder))
    unit = config["problem"]["unit"]  # losses are those of outputs in units of their root mean square
    weight = torch.load(weight_path)
    assert unit == pytest.approx(weight.norm().item() / 16**0.5)
    final = ks.load(folder / "ks_chain_final.pth").to_dense()
    expected = (2 / math.pi) ** 0.5 * ((weight - final) / unit).norm(dim=1).mean().item()  # E|x| of a normal variable
    assert curves_of(folder)[-1]["val_loss"] == pytest.approx(expected, rel=0.3)


def test_a_criterion_is_reported_in_its_own_units_and_the_mean_squared_error_in_those_of_the_outputs(
    edited, weight_path, tmp_path
):
    """On W and on 8 W: internally they are one problem, to the bit."""
    torch.save(8 * torch.load(weight_path), tmp_path / "large.pth")
    for criterion, factor in (("", 64), (L1, 1)):
        script = edited(criterion=criterion)
        small, large = (
            curves_of(train(script, path, tmp_path / f"{factor}_{path.stem}", "--quiet"))
            for path in (weight_path, tmp_path / "large.pth")
        )
        for name in ("train_loss", "val_loss"):
            assert [row[name] for row in large] == [factor * row[name] for row in small]


VECTOR = "def criterion(prediction, target):\n    return prediction[0]\n"
FAULTS = {
    "vector": (VECTOR, 2, r"returned shape \(16,\) instead"),
    "NaN": (
        "def criterion(prediction, target):\n    return (prediction * float('nan')).mean()\n",
        1,
        r"the loss \(criterion user-defined sha256 \w+\) is not finite at epoch 1, step 1 of 4",
    ),
    "fails later": (
        "CALLS = []\n\n\ndef criterion(prediction, target):\n    CALLS.append(0)\n    assert len(CALLS) < 4, 'tired'\n"
        "    return (prediction - target).square().mean()\n",
        2,
        r"the criterion of train_with_random.py failed at train_with_random.py:\d+: AssertionError: tired",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_criterion_that_fails_ends_the_run_with_one_line(edited, weight_path, tmp_path, capsys, case):
    criterion, code, message = FAULTS[case]
    train(edited(criterion=criterion), weight_path, tmp_path / "out", "--quiet", code=code)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_run_with_another_criterion_or_other_metrics_is_not_resumed(edited, weight_path, tmp_path, capsys):
    folder = train(edited(), weight_path, tmp_path / "out", "--quiet")
    for edit, change in (
        ({"criterion": L1}, "criterion was mean_squared_error, now torch"),
        ({"metrics": METRICS}, "metrics was none, now"),
    ):
        train(edited(**edit), weight_path, folder, "--resume", "--num_epochs", 5, code=2)
        assert change in capsys.readouterr().err
    assert len(curves_of(folder)) == 3


@pytest.fixture
def validation(weight_path):
    """Return a function that computes METRICS for a saved chain from its dense matrix."""
    weight = torch.load(weight_path)
    unit = weight.norm() / len(weight) ** 0.5

    def expected(path, seed=0):
        arguments = ["--weight_path", str(weight_path), *QUICK, "--device", "cpu", "--seed", str(seed)]
        config = Parser(TrainerConfig, "").parse(arguments)
        problem = resolve(config)
        ((x, y),) = make_samples(config, problem, problem.internal_weight()).validation
        prediction = x @ ks.load(path).to_dense().t() / unit
        cosine = functional.cosine_similarity(prediction, y).mean().item()
        return [cosine, (prediction - y).square().mean(0).max().item()]

    return expected


def test_metrics_follow_the_curves_through_stop_resume_and_more_epochs(
    edited, weight_path, tmp_path, capsys, monkeypatch, validation
):
    script, steps = edited(metrics=METRICS), ("--num_epochs", 4, "--save_interval", 1)
    whole = train(script, weight_path, tmp_path / "whole", *steps)
    assert re.search(r"epoch 4/4: .*, cosine [\d.]+, worst_row [\d.e-]+, ", capsys.readouterr().err)
    with monkeypatch.context() as patched:
        interrupt_in_epoch(patched, 3)
        train(script, weight_path, tmp_path / "stopped", *steps, code=130)
    stopped = train(script, weight_path, tmp_path / "stopped", *steps, "--resume")
    for first, second in zip(curves_of(whole), curves_of(stopped), strict=True):
        assert first | {"epoch_seconds": 0} == pytest.approx(second | {"epoch_seconds": 0}, rel=0, abs=0, nan_ok=True)
    train(script, weight_path, stopped, "--num_epochs", 6, "--save_interval", 1, "--resume")
    lists = json.loads((stopped / "ks_chain_rank_4_loss_curves.json").read_text())
    for row in curves_of(stopped):
        epoch = row["epoch"]
        expected = validation(stopped / f"ks_chain_epoch_{epoch}.pth")
        assert [row["cosine"], row["worst_row"]] == pytest.approx(expected, rel=1e-4, abs=1e-10)
        assert [lists[name][epoch - 1] for name in ("cosine", "worst_row")] == [row["cosine"], row["worst_row"]]
    assert len(lists["cosine"]) == 6


def test_metrics_follow_a_sweep_of_two_seeds_into_the_summary_and_the_figures(
    edited_toolkit, run, weight_path, tmp_path, validation
):
    edited_toolkit(metrics=METRICS)
    sweep = (tmp_path / "rank_sweep_study.py", "--weight_path", weight_path, *QUICK, "--ranks", 2, "--seeds", 0, 5)
    done = run(*sweep, "--metric", "cosine")
    assert done.returncode == 0, done.stderr
    study = tmp_path / "rank_sweep_results"
    assert (study / "rank_sweep_metric_cosine.png").exists()
    (row,) = read_table(study / "rank_sweep_summary.csv")
    for name in ("final", "best"):
        cosines = [validation(getattr(files_of(study, 2, seed or None), name), seed)[0] for seed in (0, 5)]
        assert float(row[f"{name}_cosine"]) == pytest.approx(sum(cosines) / 2, rel=1e-4)
    plot = (tmp_path / "plot_rank_results.py", "--results_dir", study, "--metric")
    assert run(*plot, "worst_row").returncode == 0
    assert (study / "rank_sweep_metric_worst_row.png").exists()
    done = run(*plot, "cosin")
    assert done.returncode == 2
    assert re.search(r"--metric cosin: no run .* it has cosine, worst_row$", done.stderr)


def test_a_metric_that_raises_costs_no_run(edited, weight_path, tmp_path, capsys):
    script = edited(metrics="    return {'cosine': prediction.mean(), 'bad': prediction, 'worse': 1 / 0}")
    folder = train(script, weight_path, tmp_path / "out", "--quiet")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"WARNING: metrics of train_with_random.py stay empty, because they failed at train_with_random.py:\d+: "
        "ZeroDivisionError: division by zero",
        line,
    )
    assert json.loads((folder / "ks_chain_config.json").read_text())["warnings"]["metrics"] in line
    assert len(curves_of(folder)) == 3


@pytest.mark.usefixtures("cold")
def test_another_criterion_in_the_folder_of_a_study_is_another_study(edited_toolkit, run, weight_path, tmp_path):
    """It is refused with a command that works; the tables, figures and report that this writes have no floors."""
    sweep = (tmp_path / "rank_sweep_study.py", "--weight_path", weight_path, *QUICK, "--ranks", 2)
    edited_toolkit()
    assert run(*sweep).returncode == 0
    edited_toolkit(criterion=L1)
    refused = run(*sweep, "--formats", "svg")
    assert refused.returncode == 2
    assert "criterion was mean_squared_error, now torch.nn.functional.l1_loss of torch" in refused.stderr
    script, *arguments = shlex.split(re.search("to keep it: python (.*); to replace it: ", refused.stderr)[1])
    done = run(tmp_path / script, *arguments)
    assert done.returncode == 0, done.stderr
    assert "compare final_val_loss" in " ".join(done.stdout.split())
    study = tmp_path / "rank_sweep_results_2"
    (row,) = read_table(study / "rank_sweep_summary.csv")
    assert row["final_val_loss"] != ""
    assert row["criterion"].startswith("torch.nn.functional.l1_loss of torch")
    for name in ("population_loss", "loss_floor", "verdict", "predict_zero_loss"):
        assert row[name] == ""
    assert read_table(study / "rank_sweep_floor.csv") == []
    assert not (study / "rank_sweep_floor.svg").exists()
    assert "<!-- loss, torch.nn.functional.l1_loss" in (study / "rank_sweep_loss_curves.svg").read_text()
    page = (study / "rank_sweep_report.html").read_text()
    assert "no floor holds" in page
    assert "The floor is the least" not in page


@pytest.mark.parametrize(
    ("edit", "flags", "message"),
    [
        ({"criterion": VECTOR}, (), r"the criterion of train_with_random.py returned shape \(16,\)"),
        ({"criterion": L1}, ("--target_relative_loss", 0.3), "--target_relative_loss needs the criterion mean_sq"),
        ({"criterion": L1}, ("--stop_at", "floor"), "--stop_at needs the criterion mean_squared_error"),
        ({"metrics": "    return {'val_loss': prediction.mean()}"}, (), "'val_loss' cannot name a metric"),
        ({"metrics": METRICS}, ("--metric", "cosin"), "--metric cosin: .* has the metrics cosine, worst_row"),
    ],
    ids=["criterion", "target without floors", "stop without floors", "name of a metric", "metric that is not there"],
)
def test_a_mistake_in_an_edit_ends_a_sweep_before_it_costs_anything(
    edited_toolkit, run, swept, weight_path, tmp_path, edit, flags, message
):
    study = shutil.copytree(swept[0] / "rank_sweep_results", tmp_path / "rank_sweep_results")
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*")}
    edited_toolkit(**edit)
    done = run(tmp_path / "rank_sweep_study.py", "--weight_path", weight_path, *QUICK, "--overwrite", *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(message, line)
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*")} == before


def test_a_sweep_warns_of_a_metric_that_fails_before_it_trains(edited_toolkit, run, weight_path, tmp_path):
    edited_toolkit(metrics="    return {'mean': prediction.mean(), 'rows': prediction.mean(1)}")
    done = run(tmp_path / "rank_sweep_study.py", "--weight_path", weight_path, *QUICK, "--ranks", 2)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == (
        "WARNING: metric 'rows' of train_with_random.py stays empty: it has shape (2,) instead of being a scalar"
    )
    (row,) = read_table(tmp_path / "rank_sweep_results" / "rank_sweep_summary.csv")
    assert row["final_mean"] != ""
