"""What a person edits in the training script is what trains, what a study is known by, and what its files show."""

import json
import math
import re
import shlex
import subprocess
import sys

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
MASK = "def criterion(prediction, target):\n    return (prediction - target)[:, {rows}].square().mean()\n"
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
@pytest.mark.parametrize("rows", ["::2", "1:"], ids=["every second row", "all rows but one"])
@pytest.mark.parametrize("shape", [(24, 16), (1024, 2048)], ids=str)
def test_rows_that_a_mask_leaves_out_stay_at_zero_in_the_saved_chain(edited, tmp_path, shape, rows, layout):
    script = edited(criterion=MASK.format(rows=rows))
    torch.save(torch.randn(shape, generator=torch.Generator().manual_seed(0)), tmp_path / "w.pth")
    folder = train(script, tmp_path / "w.pth", tmp_path / "out", *layout)
    trained = ks.load(folder / "ks_chain_final.pth").to_dense().norm(dim=1) > 0
    counted = torch.zeros(shape[0], dtype=torch.bool)
    counted[slice(*[int(text) if text else None for text in rows.split(":")])] = True
    assert torch.equal(trained, counted)


def test_another_criterion_says_once_what_is_left_out_and_names_what_ran(edited, weight_path, tmp_path, capsys):
    folder = train(edited(criterion=L1), weight_path, tmp_path / "out")
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if "criterion" in line]
    assert re.match(
        r"criterion torch\.nn\.functional\.l1_loss of torch [\d.]+: adamw trains; floors, exact losses", line
    )
    assert "gauss_newton" not in said.err
    assert "relative loss" not in said.out
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


def test_gauss_newton_by_name_with_another_criterion_is_refused(edited, weight_path, tmp_path, capsys):
    train(edited(criterion=L1), weight_path, tmp_path / "out", "--optimizer", "gauss_newton", code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "--optimizer gauss_newton: gauss_newton needs mean_squared_error, and the criterion is torch.nn" in line
    assert not list((tmp_path / "out").glob("*"))


def test_a_criterion_is_reported_in_its_own_units_and_the_mean_squared_error_in_those_of_the_outputs(
    edited, weight_path, tmp_path
):
    """On W and on 8 W: internally they are one problem, to the bit."""
    torch.save(8 * torch.load(weight_path), tmp_path / "large.pth")
    for criterion, factor in (("", 64), (L1, 1), (MASK.format(rows="::2"), 1)):
        script = edited(criterion=criterion)
        small, large = (
            curves_of(train(script, path, tmp_path / f"{factor}_{path.stem}", "--quiet"))
            for path in (weight_path, tmp_path / "large.pth")
        )
        for name in ("train_loss", "val_loss"):
            assert [row[name] for row in large] == [factor * row[name] for row in small]


FAULTS = {
    "raises": (
        "def criterion(prediction, target):\n    raise ValueError('no')\n",
        2,
        r"failed at \S+py:\d+: ValueError: no",
    ),
    "a vector": (
        "def criterion(prediction, target):\n    return prediction[0]\n",
        2,
        r"returned shape \(16,\) instead",
    ),
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
def test_a_criterion_that_fails_ends_in_one_line_that_names_it(edited, weight_path, tmp_path, capsys, case):
    criterion, code, message = FAULTS[case]
    train(edited(criterion=criterion), weight_path, tmp_path / "out", "--quiet", code=code)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_run_with_another_criterion_or_other_metrics_is_not_resumed(edited, weight_path, tmp_path, capsys):
    train(edited(), weight_path, tmp_path / "out", "--quiet")
    for edit, name in (
        ({"criterion": L1}, "criterion was mean_squared_error, now torch"),
        ({"metrics": METRICS}, "metrics was none, now"),
    ):
        train(edited(**edit), weight_path, tmp_path / "out", "--resume", "--num_epochs", 5, code=2)
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line
        assert line.endswith("; leave out --resume to redo it")
    assert len(curves_of(tmp_path / "out")) == 3


@pytest.fixture
def validation(weight_path):
    """Return a function from a seed to what METRICS is for a saved chain, computed from its dense matrix."""
    weight = torch.load(weight_path)
    unit = weight.norm() / len(weight) ** 0.5

    def of_seed(seed=0):
        arguments = ["--weight_path", str(weight_path), *QUICK, "--device", "cpu", "--seed", str(seed)]
        config = Parser(TrainerConfig, "").parse(arguments)
        problem = resolve(config)
        ((x, y),) = make_samples(config, problem, problem.internal_weight()).validation

        def expected(path):
            prediction = x @ ks.load(path).to_dense().t() / unit
            return [
                functional.cosine_similarity(prediction, y).mean().item(),
                (prediction - y).square().mean(0).max().item(),
            ]

        return expected

    return of_seed


def test_metrics_follow_the_curves_through_stop_resume_and_more_epochs(
    edited, weight_path, tmp_path, capsys, monkeypatch, validation
):
    script, steps = edited(metrics=METRICS), ("--num_epochs", 4, "--save_interval", 1)
    whole = train(script, weight_path, tmp_path / "whole", *steps)
    assert re.search(r"epoch 4/4: .*, cosine 0\.\d+, worst_row [\d.]+, ", capsys.readouterr().err)
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
        expected = validation()(stopped / f"ks_chain_epoch_{epoch}.pth")
        assert [row["cosine"], row["worst_row"]] == pytest.approx(expected, rel=1e-4)
        assert [lists[name][epoch - 1] for name in ("cosine", "worst_row")] == [row["cosine"], row["worst_row"]]
    assert len(lists["cosine"]) == 6


def test_metrics_follow_a_sweep_of_two_seeds_into_every_table_and_the_plot(
    edited_toolkit, weight_path, tmp_path, validation
):
    edited_toolkit(metrics=METRICS)
    sweep = [sys.executable, "rank_sweep_study.py", "--weight_path", weight_path, *QUICK, "--ranks", 2, 4]
    sweep += ["--seeds", 0, 5, "--metric", "cosine"]
    done = subprocess.run([*map(str, sweep)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "rank_sweep_results"
    assert (study / "rank_sweep_metric_cosine.png").exists()
    summary = read_table(study / "rank_sweep_summary.csv")
    long_form = read_table(study / "rank_sweep_all_curves.csv")
    for rank, row in zip((2, 4), summary, strict=True):
        found = []
        for seed in (0, 5):
            files = files_of(study, rank, None if seed == 0 else seed)
            for number, path in ((3, files.final), (best_epoch(files), files.best)):
                cosine, worst = validation(seed)(path)
                curve = read_curves(files.curves_csv)[number - 1]
                assert [curve["cosine"], curve["worst_row"]] == pytest.approx([cosine, worst], rel=1e-4)
                found.append(cosine)
                (cell,) = [
                    line["cosine"]
                    for line in long_form
                    if (line["rank"], line["seed"], line["epoch"]) == (str(rank), str(seed), str(number))
                    and line["split"] == "validation"
                ]
                assert float(cell) == pytest.approx(cosine, rel=1e-4)
        assert float(row["final_cosine"]) == pytest.approx((found[0] + found[2]) / 2, rel=1e-4)
        assert float(row["best_cosine"]) == pytest.approx((found[1] + found[3]) / 2, rel=1e-4)
    plot = [sys.executable, "plot_rank_results.py", "--results_dir", study, "--metric"]
    done = subprocess.run([*map(str, plot), "worst_row"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (study / "rank_sweep_metric_worst_row.png").exists()
    done = subprocess.run([*map(str, plot), "cosin"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "cosin" in line
    assert "worst_row" in line


def best_epoch(files):
    return min(read_curves(files.curves_csv), key=lambda row: row["val_loss"])["epoch"]


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


def test_another_criterion_in_the_folder_of_a_study_is_another_study(edited_toolkit, weight_path, tmp_path):
    """Refused with two commands that both work; finished ranks keep what they were trained with."""
    command = [sys.executable, "rank_sweep_study.py", "--weight_path", str(weight_path), *QUICK, "--output_dir", "out"]

    def sweep(*flags):
        return subprocess.run([*command, *map(str, flags)], cwd=tmp_path, capture_output=True, text=True)

    edited_toolkit()
    assert sweep("--ranks", 2).returncode == 0
    edited_toolkit(criterion=L1)
    refused = sweep("--ranks", 2, 4)
    assert refused.returncode == 2
    line = refused.stderr.splitlines()[-1]
    assert "criterion was mean_squared_error, now torch.nn.functional.l1_loss of torch" in line
    assert len(read_table(tmp_path / "out" / "rank_sweep_summary.csv")) == 1
    _, beside, instead = re.split("to keep it: |; to replace it: ", line)
    for text in (beside, instead):
        _, *arguments = shlex.split(text)
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for folder in ("out", "out_2"):
        rows = read_table(tmp_path / folder / "rank_sweep_summary.csv")
        assert [row["loss_floor"] for row in rows] == ["", ""]
        assert "compare final_val_loss" in " ".join(done.stdout.split())
    edited_toolkit()
    assert sweep("--ranks", 2, 4).returncode == 2


@pytest.mark.parametrize(
    ("edit", "flags", "message"),
    [
        ({"criterion": FAULTS["a vector"][0]}, (), r"the criterion of train_with_random.py returned shape \(16,\)"),
        ({"metrics": "    return {'val_loss': prediction.mean()}"}, (), "'val_loss' cannot name a metric"),
        ({"metrics": METRICS}, ("--metric", "cosin"), "--metric cosin: .* has the metrics cosine, worst_row"),
    ],
    ids=["criterion", "name of a metric", "metric that is not there"],
)
def test_a_mistake_in_an_edit_ends_a_sweep_before_it_costs_anything(
    edited_toolkit, weight_path, tmp_path, edit, flags, message
):
    command = [sys.executable, "rank_sweep_study.py", "--weight_path", weight_path, *QUICK, "--ranks", 2]
    edited_toolkit()
    assert subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True).returncode == 0
    study = tmp_path / "rank_sweep_results"
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*")}
    edited_toolkit(**edit)
    done = subprocess.run([*map(str, command), "--overwrite", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(message, line)
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*")} == before


def test_the_sweep_names_a_metric_that_fails_before_it_trains(edited_toolkit, weight_path, tmp_path):
    edited_toolkit(metrics="    return {'mean': prediction.mean(), 'rows': prediction.mean(1)}")
    command = [sys.executable, "rank_sweep_study.py", "--weight_path", weight_path, *QUICK, "--ranks", 2]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == (
        "WARNING: metric 'rows' of train_with_random.py stays empty: it has shape (2,) instead of being a scalar"
    )
    (row,) = read_table(tmp_path / "rank_sweep_results" / "rank_sweep_summary.csv")
    assert row["final_mean"] != ""


@pytest.mark.parametrize("flags", [("--target_relative_loss", 0.3), ("--stop_at", "floor")], ids=str)
def test_flags_of_floors_with_another_criterion_are_refused(edited_toolkit, weight_path, tmp_path, flags):
    edited_toolkit(criterion=L1)
    command = [sys.executable, "rank_sweep_study.py", "--weight_path", weight_path, *QUICK, *flags]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{flags[0]} needs the criterion mean_squared_error" in line
    assert not (tmp_path / "rank_sweep_results").exists()
