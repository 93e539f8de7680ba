"""Several layers of a checkpoint, as users run them: plan, runs, resume, bad input."""

import json

import numpy as np
import pytest
import torch
from conftest import QUICK, read_table, save_moments
from html_page import Page
from measured import measured_moments

import ks
import plot_rank_results
import rank_sweep_study
from ks.files.atomic import write_json
from ks.files.layout import SweepFiles
from ks.files.ownership import locked
from ks.model.model_plan import ModelPlan
from ks.moments.metric import LossMetric
from ks.moments.moments_file import InputMoments
from ks.study.checkpoint_study import CheckpointStudy

pytestmark = pytest.mark.usefixtures("blank_pictures")
LAYERS = ("block.0.up.weight", "block.0.down.weight", "block.1.up.weight", "block.1.down.weight")


@pytest.fixture
def checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {"embed.weight": torch.randn(9, 16, generator=generator), "block.0.norm.weight": torch.ones(16)}
    for index, name in enumerate(LAYERS):
        rows, cols = (24, 16) if "up" in name else (16, 24)
        rank = 2 * index + 2
        tensors[name] = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, cols, generator=generator)
        tensors[name] += 0.3 * torch.randn(rows, cols, generator=generator)
    torch.save(tensors, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def study(checkpoint, folder, *flags, keys=("block.*.*.weight",), code=0):
    arguments = ["--weight_path", checkpoint, "--weight_key", *keys, "--output_dir", folder, *QUICK, *flags]
    assert rank_sweep_study.main([str(argument) for argument in arguments]) == code


def test_a_dry_run_compares_the_families_of_every_layer(checkpoint, tmp_path, capsys):
    study(checkpoint, tmp_path / "out", "--dry_run")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:9]] == [name for name in LAYERS for _ in range(2)]
    assert printed[9].startswith("at_75%: the fraction of the output energy that is lost")
    rows = read_table(tmp_path / "out" / "rank_sweep_layer_floors.csv")
    tensors = torch.load(checkpoint)
    for row in rows:
        if row["layer"] == LAYERS[1] and row["chain"] == "lowrank":
            values = torch.linalg.svdvals(tensors[LAYERS[1]].double()).square()
            loss = values[int(row["rank"]) :].sum() / values.sum()
            assert float(row["relative_loss"]) == pytest.approx(loss.item(), rel=1e-9)
            assert int(row["parameters"]) == int(row["rank"]) * 40
    assert {row["chain"] for row in rows} == {"monarch", "lowrank"}


def test_a_plan_is_written_and_a_second_budget_uses_its_floors(checkpoint, tmp_path, capsys):
    study(checkpoint, tmp_path / "out", "--budget", 0.6, "--dry_run")
    first = capsys.readouterr()
    assert "4 of 4: block.1.down.weight, 16 × 24" in first.err
    plan = ModelPlan.load(tmp_path / "out" / "rank_sweep_plan.json")
    assert plan.share <= 0.6
    assert plan.checkpoint == "model.pth"
    assert f"{plan.parameters:,} of 1,536" in first.out
    table = read_table(tmp_path / "out" / "rank_sweep_plan.csv")
    assert [row["layer"] for row in table] == list(LAYERS)
    study(checkpoint, tmp_path / "out", "--budget", 0.4, "--dry_run")
    assert "floors of 4 layers were computed before" in capsys.readouterr().err
    assert ModelPlan.load(tmp_path / "out" / "rank_sweep_plan.json").share <= 0.4
    study(checkpoint, tmp_path / "out", "--target_relative_loss", 0.1, "--dry_run")
    assert ModelPlan.load(tmp_path / "out" / "rank_sweep_plan.json").mean_relative_loss <= 0.1


def test_every_planned_layer_is_trained_and_resumed(checkpoint, tmp_path, capsys):
    folder = tmp_path / "out"
    study(checkpoint, folder, "--budget", 0.5, keys=LAYERS[:2])
    plan = ModelPlan.load(folder / "rank_sweep_plan.json")
    rows = read_table(folder / "rank_sweep_summary.csv")
    trained = [layer for layer in plan.layers if layer.chain is not None]
    assert [(row["weight_key"], int(row["rank"])) for row in rows] == [(layer.layer, layer.rank) for layer in trained]
    for layer, row in zip(trained, rows):
        chain = ks.load(folder / layer.layer / f"rank_{layer.rank}" / f"rank_{layer.rank}_final.pth")
        assert chain.num_parameters == layer.parameters
        assert float(row["relative_loss"]) >= layer.relative_loss_lower * (1 - 1e-6)
        assert (folder / layer.layer / "rank_sweep_loss_curves.png").exists()
    capsys.readouterr()
    study(checkpoint, folder, "--budget", 0.5, keys=LAYERS[:2])
    assert capsys.readouterr().err.count("finished before") == len(trained)


def test_without_a_budget_every_layer_trains_the_given_ranks(checkpoint, tmp_path):
    study(checkpoint, tmp_path / "out", "--chain", "lowrank", "--ranks", 2, "--seeds", 0, 1, keys=LAYERS[:2])
    rows = read_table(tmp_path / "out" / "rank_sweep_summary.csv")
    assert [(row["weight_key"], row["rank"]) for row in rows] == [(name, "2") for name in LAYERS[:2]]
    assert {row["num_seeds"] for row in rows} == {"2"}


def test_the_folder_of_every_layer_is_locked(checkpoint, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    busy = folder / LAYERS[1]
    busy.mkdir(parents=True)
    with locked(busy / ".sweep.lock", "a test"):
        study(checkpoint, folder, "--ranks", 2, keys=LAYERS[:2], code=2)
    assert f"{busy} is in use by another sweep" in capsys.readouterr().err
    assert not list(folder.rglob(".sweep.lock"))

    def locks_of(study, conclude=CheckpointStudy.conclude):
        found.extend(sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob(".sweep.lock")))
        return conclude(study)

    found = []
    monkeypatch.setattr(CheckpointStudy, "conclude", locks_of)
    study(checkpoint, folder, "--ranks", 2, keys=LAYERS[:2])
    assert found == [".", *sorted(LAYERS[:2])]
    assert not list(folder.rglob(".sweep.lock"))


def test_an_interrupted_study_still_writes_its_summary(checkpoint, tmp_path, monkeypatch):
    def check():
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointStudy, "run", lambda study: monkeypatch.setattr("ks.signals.check", check))
    study(checkpoint, tmp_path / "out", "--ranks", 2, keys=LAYERS[:2], code=130)
    rows = read_table(tmp_path / "out" / "rank_sweep_summary.csv")
    assert [row["weight_key"] for row in rows] == list(LAYERS[:2])


def test_layers_are_planned_for_the_inputs_that_they_see(checkpoint, tmp_path):
    generator, moments = torch.Generator().manual_seed(1), None
    for name, width in zip(LAYERS[:2], (16, 24)):
        rows = torch.randn(200, width, generator=generator) @ torch.randn(width, width, generator=generator)
        part = InputMoments.load(save_moments(tmp_path / "part.safetensors", rows, rows[:40], name))
        moments = part if moments is None else moments.merge(part)
    moments.save(tmp_path / "inputs.safetensors")
    flags = ("--inputs", tmp_path / "inputs.safetensors", "--budget", 0.5)
    study(checkpoint, tmp_path / "out", *flags, keys=LAYERS[:2])
    plan = ModelPlan.load(tmp_path / "out" / "rank_sweep_plan.json")
    assert all(layer.inputs_sha256 for layer in plan.layers)
    assert plan.mean_relative_loss_lower <= plan.mean_relative_loss
    for row in read_table(tmp_path / "out" / "rank_sweep_summary.csv"):
        assert float(row["held_out_relative_loss"]) > 0


def test_gradients_in_the_inputs_make_a_plan_by_the_loss_of_the_model(checkpoint, tmp_path, capsys):
    weights = {name: torch.load(checkpoint)[name] for name in LAYERS}
    measured_moments(weights).save(tmp_path / "inputs.safetensors")
    inputs = ("--inputs", tmp_path / "inputs.safetensors", "--chains", "lowrank", "--dry_run")

    def planned(*flags):
        study(checkpoint, tmp_path / "out", *inputs, *flags)
        return ModelPlan.load(tmp_path / "out" / "rank_sweep_plan.json"), capsys.readouterr().out

    plan, printed = planned("--budget", 0.5)
    assert plan.loss_metric is LossMetric.MODEL_LOSS
    assert printed.startswith("The plan keeps")
    assert "nats per token (perplexity ×" in printed
    assert "WARNING" not in printed
    rows = read_table(tmp_path / "out" / "rank_sweep_plan.csv")
    assert [float(row["loss_increase"]) for row in rows] == pytest.approx([each.loss_increase for each in plan.layers])
    energy, printed = planned("--budget", 0.5, "--loss_metric", "output_energy")
    assert energy.loss_metric is LossMetric.OUTPUT_ENERGY
    assert printed.startswith("WARNING: this plan minimises the output energy")
    assert energy.loss_increase > plan.loss_increase
    target, _ = planned("--target_loss_increase", plan.loss_increase)
    assert target.loss_increase <= plan.loss_increase * (1 + 1e-9)
    study(checkpoint, tmp_path / "families", *inputs, "--loss_metric", "model_loss")
    printed = " ".join(capsys.readouterr().out.split())
    assert "at_75%: the predicted increase of the loss of the model per token (nats) with 75% of the" in printed


def test_planned_layers_are_trained_in_the_metric_of_the_plan(checkpoint, tmp_path, capsys):
    weights = {name: torch.load(checkpoint)[name] for name in LAYERS[:2]}
    measured_moments(weights).save(tmp_path / "inputs.safetensors")
    flags = ("--inputs", tmp_path / "inputs.safetensors", "--chains", "lowrank", "--budget", 0.5)
    study(checkpoint, tmp_path / "out", *flags, keys=LAYERS[:2])
    plan = ModelPlan.load(tmp_path / "out" / "rank_sweep_plan.json")
    for layer in plan.layers:
        config = tmp_path / "out" / layer.layer / f"rank_{layer.rank}" / f"rank_{layer.rank}_config.json"
        assert json.loads(config.read_text())["settings"]["loss_metric"] == "model_loss"
    # 2 of 4 layers, an embedding and a norm: a reader must not take the plan for one of the whole model
    assert plan.coverage.startswith("768 of 1,696 parameters (45.3%); the others: ")
    assert plan.sentences()[-1] == f"These weights have {plan.coverage}."
    printed = capsys.readouterr().err
    assert plan.sentences()[-1] in printed
    assert "energy loss" in printed
    assert "relative loss" not in printed


def test_the_page_of_the_model_has_its_plan_its_runs_and_links_to_its_layers(checkpoint, tmp_path, capsys):
    weights = {name: torch.load(checkpoint)[name] for name in LAYERS[:2]}
    measured_moments(weights).save(tmp_path / "inputs.safetensors")
    flags = ("--inputs", tmp_path / "inputs.safetensors", "--chains", "lowrank", "--budget")
    study(checkpoint, tmp_path / "out", *flags, 0.5, keys=LAYERS[:2])
    files = SweepFiles((tmp_path / "out").rename(tmp_path / "moved"), "rank_sweep")
    text = files.report.read_text()
    page, plan = Page(text), ModelPlan.load(files.plan_json)
    assert page.loads == [f"{name}/rank_sweep_report.html" for name in LAYERS[:2]]
    assert all((files.directory / address).is_file() for address in page.loads)
    total = sum(float(row["loss_increase"]) for row in read_table(files.summary_csv))
    assert f"<h1>The trained chains are predicted to cost the model {float(f'{total:.3g}'):g} nats per token" in text
    assert "--budget 0.5" in page.text
    assert str(tmp_path) not in text

    def redrawn():
        assert plot_rank_results.main(["--results_dir", str(files.directory), "--report"]) == 0
        return files.report.read_text()

    assert redrawn() == text
    plan.measured(2.0, 3.0).save(files.directory / "mine_plan.json")
    assert "mine_plan.json" in Page(redrawn()).text
    assert Page(redrawn()).count("figure") == 1
    broken = files.directory / "broken_plan.json"
    write_json(broken, {"version": 2, "measured_increase": 1.0})
    study(checkpoint, files.directory, *flags, 0.5, keys=LAYERS[:2])
    assert f"WARNING: the report has no measured plans, because {broken} is not valid" in capsys.readouterr().err
    assert Page(files.report.read_text()).count("figure") == 0
    broken.unlink()
    study(checkpoint, files.directory, *flags, 0.4, "--dry_run", keys=LAYERS[:2])
    assert "rank_sweep_plan.json was made for another goal than these runs" in redrawn()


def test_a_checkpoint_is_expanded_to_its_layers_beside_another_study(checkpoint, tmp_path, capsys):
    study(checkpoint, tmp_path / "a", "--chain", "lowrank", "--ranks", 2, keys=LAYERS[:2])
    study(checkpoint, tmp_path / "b", "--ranks", 1, 2, keys=LAYERS[:1])
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("a", "b", f"a/{LAYERS[0]}")]
    assert plot_rank_results.main(["--results_dir", *folders, "--output_dir", str(tmp_path), "--report"]) == 0
    printed = capsys.readouterr().out
    assert "b: monarch (rows" in printed
    assert printed.count("relative_loss: the fraction") == 1
    assert "\n\n\n" not in printed
    page = Page((tmp_path / "rank_sweep_report.html").read_text())
    addresses = [*(f"a/{name}/rank_sweep_report.html" for name in LAYERS[:2]), "b/rank_sweep_report.html"]
    assert page.loads == addresses
    assert "These are studies of 2 weights." in page.text
    folders = folders[1:]  # the others are of three studies, which stay
    assert plot_rank_results.main(["--results_dir", *folders, "--output_dir", str(tmp_path), "--report"]) == 2
    assert "rank_sweep_chains.png is in the way" in capsys.readouterr().err


BAD = {
    "gradients of some layers": (
        ("--inputs", "some.safetensors", "--budget", 0.5),
        LAYERS,
        "no gradients of the loss of the model for block.0.up.weight, block.1.down.weight; collect them",
    ),
    "gradients of another model": (
        ("--inputs", "other.safetensors", "--budget", 0.5),
        LAYERS,
        "other.safetensors: gradients of 16 outputs for block.0.up.weight, which has 24; give the moments of this",
    ),
    "glob": ((), ("block.*.upp.weight",), "nothing matches 'block.*.upp.weight'; nearest of 6: block.1.up.weight"),
    "budget and target": (("--budget", 0.5, "--target_relative_loss", 0.1), LAYERS, "give one or the other"),
    "chain and chains": (("--chain", "lowrank", "--chains", "monarch"), LAYERS, "give one or the other"),
    "several chains": (("--chains", "lowrank", "monarch"), LAYERS, "to choose one for each layer"),
    "multiple": (("--rank_multiple", 8), LAYERS, "give --budget or a target too"),
    "splits": (("--row_splits", 4, 6, "--col_splits", 4, 4), LAYERS, "are for one weight"),
    "no floor": (("--chain", "lowrank_butterfly"), LAYERS, "has no floor, and a plan needs one"),
    "inputs": (("--inputs", "x.safetensors"), LAYERS, "(4 layers lack them); collect them, or name other layers"),
    "samples": (("--inputs", "x.npy"), LAYERS, "x.npy holds no moments of inputs"),
    "bias": (("--fit_bias",), LAYERS, "--fit_bias is for one weight"),
}


@pytest.mark.parametrize(("flags", "keys", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_written(checkpoint, tmp_path, monkeypatch, capsys, flags, keys, message):
    monkeypatch.chdir(tmp_path)
    save_moments(tmp_path / "x.safetensors", torch.randn(50, 16), None, "other.layer.proj")
    np.save(tmp_path / "x.npy", torch.randn(50, 16).numpy())
    weights = {name: torch.load(checkpoint)[name] for name in LAYERS}
    measured_moments(weights, (LAYERS[0], LAYERS[3])).save(tmp_path / "some.safetensors")
    measured_moments({name: weight[:16] for name, weight in weights.items()}).save(tmp_path / "other.safetensors")
    study(checkpoint, tmp_path / "out", *flags, keys=keys, code=2)
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_user_is_not_overwritten(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rank_sweep_plan.json").write_text("mine")
    study(checkpoint, tmp_path / "out", "--budget", 0.5, "--dry_run", code=2)
    assert "no record lists it as the toolkit's" in capsys.readouterr().err
    assert (tmp_path / "out" / "rank_sweep_plan.json").read_text() == "mine"


def test_one_weight_and_a_checkpoint_are_different_studies(checkpoint, tmp_path, capsys):
    study(checkpoint, tmp_path / "out", "--ranks", 2, keys=LAYERS[:1])
    study(checkpoint, tmp_path / "out", "--ranks", 2, "--chain", "lowrank", keys=LAYERS[:2], code=2)
    assert "another study" in capsys.readouterr().err
