import train_with_random
from ks.bounds.floors import Floor
from ks.training import target
from ks.training.problem import resolve
from ks.training.target import Target, target_of


def outcome(share, loss, lower, upper):
    floor = Floor(4, lower, upper, lower == upper)
    [said] = Target(share, 4, 2.0, floor, 9, ()).outcome({"population_loss": 2 * loss})
    return said


def test_the_outcome_goes_by_the_exact_loss_and_names_the_floor():
    start = "Rank 4 loses at most 10% of the output energy: it loses "
    assert outcome(0.1, 0.0998, 0.0995, 0.0995) == f"{start}9.98%, its floor is 9.95%."
    assert outcome(0.1, 0.1, 0.08, 0.09).endswith(": it loses 10%, its floor is 8% to 9%.")
    start = "10% of the output energy is not reached: rank 4 ends at "
    remedy = "Use more --num_epochs or a larger --rank."
    assert outcome(0.1, 0.1007, 0.0999, 0.0999) == f"{start}10.07%, its floor is 9.99%. {remedy}"
    assert outcome(0.1, 0.100001, 0.09, 0.09).startswith(f"{start}10.0001%, ")
    assert outcome(0.1, 0.42, 0.4, 0.41) == f"{start}42%, its floor is 40% to 41%. Use --rank 9."


def test_no_outcome_without_a_target_and_no_number_that_is_not_known():
    assert Target(None, 4, 2.0, None, None, ()).outcome({"population_loss": 1.0}) == []
    [said] = Target(0.1, 4, 2.0, None, None, ()).outcome({"val_loss": 1.0})
    assert said.startswith("The criterion is not the mean squared error")
    [said] = Target(0.1, 4, 2.0, None, None, ()).outcome({"population_loss": 0.1})
    assert said == "Rank 4 loses at most 10% of the output energy: it loses 5%."


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
    assert second.startswith("Rank 4 loses at most 50% of the output energy: it loses ")
    assert second.endswith("its floor is 0%.")
    assert train_with_random.main([*arguments, "1e-9", "--resume"]) == 0  # the target is no setting of a training
    first, second = capsys.readouterr().out.splitlines()
    assert "finished before" in first
    assert "of the output energy is not reached: rank 4 ends at " in second
    assert second.endswith("Use more --num_epochs or a larger --rank.")
