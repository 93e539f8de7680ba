"""A sweep of one layer by the loss of the model: its target in nats, its files, and what it prints."""

import dataclasses
import shlex

import pytest
import torch
from conftest import QUICK, read_table, save_moments

import plot_rank_results
import rank_sweep_study
from ks.bounds.rank_floors import RankFloors
from ks.errors import UsageError
from ks.files.atomic import read_json, write_json
from ks.files.layout import SweepFiles
from ks.files.schema import StudyRecord, convert
from ks.files.weights import Weight
from ks.study.folder import parse
from ks.study.runs import ranks_of
from ks.study.study_floors import keep_floors, plan_floors
from ks.training.problem import relative_target, resolve

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def given(tmp_path, weight_path):
    """The flags of a low-rank sweep, whose floors are exact, on inputs and gradients of few directions."""
    generator = torch.Generator().manual_seed(3)
    inputs, gradients = (
        torch.randn(200, size, generator=generator) * torch.arange(1, size + 1) ** -0.7 for size in (24, 16)
    )
    path = save_moments(
        tmp_path / "x.safetensors", inputs[:150], inputs[150:], "w.weight", gradients[:150], gradients[150:]
    )
    flags = ["--weight_path", weight_path, "--inputs", path, "--output_dir", tmp_path / "out", "--chain", "lowrank"]
    return [str(flag) for flag in flags]


@pytest.fixture
def zero(given):
    """The loss of the zero predictor, in nats per token."""
    return problem_of(given, "--loss_metric", "model_loss").predict_zero_loss


def config_of(*flags):
    return rank_sweep_study.build_parser().parse([str(flag) for flag in flags])


def problem_of(given, *flags):
    return resolve(config_of(*given, *flags))


def test_a_target_in_nats_is_one_of_the_zero_predictor_and_too_large_a_one_is_refused(given, zero):
    config = config_of(*given, "--target_loss_increase", zero / 8)
    problem = resolve(config)
    assert relative_target(config, problem) == pytest.approx(1 / 8)
    with pytest.raises(UsageError, match="the zero predictor costs .* nats per token"):
        relative_target(config_of(*given, "--target_loss_increase", 2 * zero), problem)


def test_the_note_of_floors_has_the_name_of_the_layer(given, capsys):
    problem = problem_of(given)
    problem = dataclasses.replace(problem, weight=Weight(problem.weight.tensor, "a.up.weight"))
    plan_floors(config_of(*given), problem)
    assert "computing the floors of a.up.weight, 16 × 24, lowrank" in capsys.readouterr().err


def test_floors_are_those_of_the_metric_and_bounds_of_both_metrics_live_in_one_file(given, zero, tmp_path):
    (tmp_path / "out").mkdir()
    curves = {}
    for metric in ("output_energy", "model_loss"):
        config = config_of(*given, "--loss_metric", metric)
        problem = resolve(config)
        floors = plan_floors(config, problem)
        assert floors.known.curve is None
        curves[metric] = floors.curve
        keep_floors(config, problem, floors)
    metric, weight = problem.layer_inputs.model_metric, problem.weight.tensor.double()
    exact = RankFloors(weight, problem.chain, metric).curve
    torch.testing.assert_close(curves["model_loss"] * zero, exact * len(weight) / 2, rtol=1e-6, atol=1e-9)
    assert floors.isotropic_curve is None  # isotropic inputs have no gradients
    for metric, curve in curves.items():
        config = config_of(*given, "--loss_metric", metric)
        assert torch.equal(plan_floors(config, resolve(config)).known.curve, curve)


def test_a_dry_run_prints_floors_in_the_unit_of_the_loss(given, zero, capsys):
    assert rank_sweep_study.main([*given, "--loss_metric", "model_loss", "--ranks", "2", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "loss_floor: no chain of the rank can have a smaller loss, in nats per token." in printed
    assert "relative" not in printed
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("   2 "))
    assert 0 < float(row[1]) < zero


def test_a_sweep_is_read_back_and_drawn_in_its_unit_and_in_no_figure_with_one_of_the_other_metric(
    given, zero, tmp_path, capsys
):
    target = f"{zero / 4:.3g}"
    assert rank_sweep_study.main([*given, *QUICK, "--ranks", "2", "4", "8", "--target_loss_increase", target]) == 0
    log = " ".join(capsys.readouterr().err.split())
    assert f"target {float(target):.3g} nats per token, for the measured inputs: rank " in log
    files = SweepFiles(tmp_path / "out", "rank_sweep")
    rows = read_json(files.summary_json)
    assert {(row["loss_metric"], row["loss_unit"]) for row in rows} == {("model_loss", "nats")}
    for row, run in zip(rows, read_table(files.runs_csv)):
        assert row["loss_increase"] == pytest.approx(row["population_loss"], rel=1e-5)
        assert row["held_out_loss_increase"] == pytest.approx(row["final_val_loss"], rel=1e-4)
        assert row["loss_floor"] <= row["loss_increase"] * (1 + 1e-9)
        assert float(run["energy_loss"]) == row["energy_loss"] != row["relative_loss"]
        assert row["target_relative_loss"] == pytest.approx(float(target) / zero)
    answer = read_json(files.config)["answer"]
    assert "nats per token" in answer[0]
    assert plot_rank_results.main(["--results_dir", str(tmp_path / "out")]) == 0
    assert answer[0].split(" it costs ")[0] in " ".join(capsys.readouterr().out.split())
    folders = [str(tmp_path / name) for name in ("out", "energy")]
    assert rank_sweep_study.main([*given, *QUICK, "--ranks", "2", "--output_dir", folders[1]]) == 0
    energy = read_json(SweepFiles(tmp_path / "energy", "rank_sweep").summary_json)[0]
    assert energy["energy_loss"] == pytest.approx(energy["relative_loss"], rel=1e-5)
    assert energy["loss_increase"] > 0
    assert plot_rank_results.main(["--results_dir", *folders, "--output_dir", str(tmp_path / "both")]) == 0
    assert "by output energy and by the loss of the model do not compare" in " ".join(capsys.readouterr().out.split())
    drawn = {path.name for path in (tmp_path / "both").glob("*.png")}
    assert drawn == {f"rank_sweep_chains_{metric}_measured.png" for metric in ("output_energy", "model_loss")}


def test_a_rerun_takes_the_target_of_the_study_or_the_one_that_is_given(given, tmp_path):
    config = config_of(*given, "--target_loss_increase", 0.01)
    arguments = vars(config) | {name: str(getattr(config, name)) for name in ("weight_path", "inputs")}
    (tmp_path / "out").mkdir()
    record = {"settings": {"num_epochs": config.num_epochs}, "ranks": [2], "seeds": [0], "arguments": arguments}
    write_json(SweepFiles(tmp_path / "out", "rank_sweep").config, record)
    again = parse(rank_sweep_study.build_parser(), given)
    assert (again.target_loss_increase, again.loss_metric, again.ranks) == (0.01, "model_loss", (2,))
    families = parse(rank_sweep_study.build_parser(), [*given[:-2], "--chains", "lowrank", "monarch"])
    assert (families.chain, families.chains) == (None, ("lowrank", "monarch"))
    other = parse(rank_sweep_study.build_parser(), [*given, "--target_relative_loss", "0.5"])
    assert (other.target_loss_increase, other.target_relative_loss, other.loss_metric) == (None, 0.5, "model_loss")
    problem = resolve(config)
    floors = plan_floors(config, problem)
    for increase, ranks in ((0.01, {2}), (0.02, {*floors.ranks_around(0.02 / problem.predict_zero_loss)})):
        changed = config_of(*given, "--target_loss_increase", increase)
        target = relative_target(changed, problem)
        assert ranks_of(changed, floors, convert(record, StudyRecord, "a test"), target)[0] == ranks


def test_families_are_compared_in_nats(given, zero, capsys):
    flags = [*given[:-2], "--chains", "lowrank", "--dry_run"]
    assert rank_sweep_study.main([*flags, "--target_loss_increase", f"{zero / 4:.2g}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"To cost at most {float(f'{zero / 4:.2g}'):.3g} nats per token, lowrank of rank ")
    assert "It is predicted to cost " in printed
    assert "loss_increase: the predicted increase of the loss of the model, in nats per token." in printed
    command = shlex.split(printed.partition("To train lowrank chains: ")[2])
    assert command[command.index("--loss_metric") + 1] == "model_loss"
    assert rank_sweep_study.main([*flags, "--loss_metric", "model_loss"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Lowrank costs least with ")
    assert " nats (rank " in printed
