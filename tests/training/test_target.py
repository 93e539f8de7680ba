import pytest

import train_with_random
from ks.bounds.floors import Floor
from ks.training import target
from ks.training.problem import resolve
from ks.training.target import Target, target_of


def outcome(share, loss, lower, upper):
    floor = Floor(4, lower, upper, lower == upper)
    return Target(share, 4, 2.0, floor, ()).outcome({"population_loss": 2 * loss})


@pytest.mark.parametrize(
    ("loss", "lower", "upper", "said"),
    [
        (0.0998, 0.0995, 0.0995, "reached: rank 4 loses 9.98% of the output energy, its floor is 9.95%"),
        (0.1, 0.08, 0.09, "reached: rank 4 loses 10.00% of the output energy, its floor is 8.00% to 9.00%"),
        (
            0.1007,
            0.0999,
            0.0999,
            "not reached: rank 4 loses 10.07% of the output energy, its floor is 9.99%; use more --num_epochs or a "
            "larger --rank",
        ),
        (
            0.42,
            0.4,
            0.41,
            "not reached: rank 4 loses 42.00% of the output energy, its floor is 40.00% to 41.00%; only a larger "
            "--rank can reach it",
        ),
    ],
    ids=str,
)
def test_the_outcome_goes_by_the_exact_loss_and_names_the_floor(loss, lower, upper, said):
    assert outcome(0.1, loss, lower, upper) == [f"target 0.1, {said}"]


def test_no_outcome_without_a_target_and_none_without_a_population_loss():
    assert Target(None, 4, 2.0, None, ()).outcome({"population_loss": 1.0}) == []
    [said] = Target(0.1, 4, 2.0, None, ()).outcome({"val_loss": 1.0})
    assert said == "target 0.1: not known, because the criterion is not the mean squared error"
    [said] = Target(0.1, 4, 2.0, None, ()).outcome({"population_loss": 0.1})
    assert said == "target 0.1, reached: rank 4 loses 5.00% of the output energy"


def test_floors_are_computed_for_a_target_alone(weight_path, monkeypatch):
    arguments = ["--weight_path", str(weight_path), "--rank", "2"]
    config = train_with_random.build_parser().parse([*arguments, "--target_relative_loss", "0.3"])
    found = target_of(config, resolve(config))
    assert found.notes[-1].startswith("target 0.3, for isotropic inputs: rank ")
    assert found.floor.exact
    monkeypatch.setattr(target, "make_plan", None)
    config = train_with_random.build_parser().parse(arguments)
    assert target_of(config, resolve(config)).notes == found.notes[:-1]


def test_the_trainer_says_what_the_sweep_says_and_whether_the_target_was_reached(weight_path, tmp_path, capsys):
    arguments = ["--weight_path", str(weight_path), "--rank", "4", "--num_samples", "400", "--num_epochs", "20"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--target_relative_loss"]
    assert train_with_random.main([*arguments, "0.5"]) == 0
    said = capsys.readouterr()
    for start in ("saturation: from rank 4 on", "parity: from rank ", "target 0.5, for isotropic inputs: rank "):
        assert any(line.startswith(start) for line in said.err.splitlines())
    first, second = said.out.splitlines()
    assert first.startswith("rank 4: validation loss")
    assert second.startswith("target 0.5, reached: rank 4 loses ")
    assert second.endswith("its floor is 0.00%")
    assert train_with_random.main([*arguments, "1e-9", "--resume"]) == 0  # the target is no setting of a training
    first, second = capsys.readouterr().out.splitlines()
    assert "finished before" in first
    assert second.startswith("target 1e-09, not reached: rank 4 loses ")
    assert second.endswith("use more --num_epochs or a larger --rank")
