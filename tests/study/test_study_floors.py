"""The floors of a study are computed once; a dry run over several families of one weight answers by them alone."""

import pytest
import torch
from conftest import QUICK

import rank_sweep_study
from ks.bounds import rank_floors
from ks.bounds.rank_floors import Certified, RankFloors
from ks.chain.patterns import make_chain
from ks.cli.parser import to_arguments
from ks.files.atomic import read_json
from ks.files.layout import SweepFiles
from ks.study.processes import LocalLauncher
from ks.study.study_floors import SlowWork, certify


@pytest.fixture
def arguments(weight_path, tmp_path):
    """Flags of a study of a 16 × 24 weight on raw samples that couple the column groups."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    torch.save(samples, tmp_path / "samples.pt")
    paths = ["--weight_path", str(weight_path), "--inputs", str(tmp_path / "samples.pt")]
    return [*paths, "--output_dir", str(tmp_path / "out"), *QUICK]


def forbid_bounds(monkeypatch):
    for name in ("chain_bounds", "floor_curve", "low_rank_energies"):
        monkeypatch.delattr(rank_floors, name)


def test_a_rerun_computes_no_bound_and_says_the_same(arguments, tmp_path, monkeypatch, capsys):
    arguments += ["--ranks", "1", "2", "--target_relative_loss", "0.5"]
    files = SweepFiles(tmp_path / "out", "rank_sweep")
    assert rank_sweep_study.main(arguments) == 0
    first, facts = capsys.readouterr().out, read_json(files.config)["facts"]
    assert facts["target"]["none_below"] <= facts["target"]["reaching"]
    assert facts["uncertified"] == []
    with monkeypatch.context() as patch:
        forbid_bounds(patch)
        assert rank_sweep_study.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert read_json(files.config)["facts"] == facts
    files.bounds.write_bytes(b"PK\x03\x04 broken")  # counts as empty
    assert rank_sweep_study.main(arguments) == 0
    assert capsys.readouterr().out == first
    with monkeypatch.context() as patch:
        forbid_bounds(patch)
        assert rank_sweep_study.main([*arguments, "--dry_run"]) == 0


def test_a_new_target_prints_the_ranks_that_it_adds_to_a_study(arguments, capsys):
    assert rank_sweep_study.main([*arguments, "--ranks", "1"]) == 0
    for flags, announced in (([], True), (["--ranks", "1"], False)):
        capsys.readouterr()
        plan = [*arguments, "--target_relative_loss", "0.3", "--dry_run", *flags]
        assert rank_sweep_study.main(plan) == 0
        printed = capsys.readouterr()
        planned = [line.split()[0] for line in printed.out.splitlines() if "%" in line and line.split()[0].isdigit()]
        expected = f"trained too: {' '.join(planned[1:])}; --ranks 1 trains no others\n"
        assert (expected in printed.err, "trained too" in printed.err) == (announced, announced)
        assert (planned == ["1"]) != announced


def test_without_seconds_no_lower_bound_is_certified_and_the_answer_says_so(arguments, monkeypatch, capsys):
    monkeypatch.delattr("ks.bounds.floors.CoupledBounds.lower")
    assert rank_sweep_study.main([*arguments, "--ranks", "1", "2", "--num_epochs", "1", "--tight_bounds", "0"]) == 0
    assert "not within 0 s: raise --tight_bounds." in " ".join(capsys.readouterr().out.split())


def test_one_weight_and_several_families_are_answered_without_a_file(arguments, tmp_path, capsys):
    arguments += ["--chains", "monarch", "lowrank", "--dry_run"]
    assert rank_sweep_study.main([*arguments, "--target_relative_loss", "0.3"]) == 0
    by_target = capsys.readouterr().out
    assert by_target.startswith("To lose at most 30% of the output energy, ")
    assert [line.split()[0] for line in by_target.splitlines() if line[:7] in ("monarch", "lowrank")]
    family = by_target.removeprefix("To lose at most 30% of the output energy, ").split()[0]
    assert f"--chain {family} " in by_target.splitlines()[-1]  # the command to train the smallest
    assert rank_sweep_study.main(arguments) == 0
    assert "of the parameters of the dense weight." in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "seconds"), [([], 30.0), (["--tight_bounds"], 3600.0), (["--tight_bounds", "5"], 5.0)]
)
def test_the_seconds_for_bounds_may_be_left_out(given, seconds):
    parser = rank_sweep_study.build_parser()
    config = parser.parse(["--weight_path", "w", *given, "--ranks", "2"])
    assert config.tight_bounds == seconds
    earlier = to_arguments({"weight_path": "w", "tight_bounds": True})  # of an earlier version's study
    assert parser.parse(earlier).tight_bounds == 3600.0


def test_slow_work_prints_its_step_every_two_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("ks.study.study_floors.time.monotonic", lambda: now[0])
    work = SlowWork(quiet=False)
    for second, step in ((1.0, "10%"), (2.1, "20%"), (3.0, "30%"), (4.5, "55%")):
        now[0] = second
        work(step)
    assert capsys.readouterr().err == "20%\n55%\n"


@pytest.mark.parametrize(
    ("more", "known_before"),
    [
        ([], False),
        (["--stop_at", "floor"], True),
        (["--target_relative_loss", "0.5"], True),
        (["--inputs", "samples.pt"], True),
        (["--chain", "butterfly"], True),
    ],
    ids=str,
)
def test_no_run_waits_for_floors_that_nothing_but_the_report_needs(
    arguments, tmp_path, monkeypatch, blank_pictures, more, known_before
):
    monkeypatch.chdir(tmp_path)
    files, seen = SweepFiles(tmp_path / "out", "rank_sweep"), []

    def run(self, tasks, poll):
        for _ in range(3):
            seen.append((files.bounds.exists(), files.floor_csv.exists()))
            poll([])
        seen.append((files.bounds.exists(), files.floor_csv.exists()))
        return iter(())

    monkeypatch.setattr(LocalLauncher, "run", run)
    arguments = [*arguments[:2], *arguments[4:], "--ranks", "1", "2", *more]
    assert rank_sweep_study.main(arguments) == 1  # no run has started
    assert seen[0] == (known_before, known_before)
    assert seen[-1] == (True, True)


def test_bounds_found_while_runs_trained_count_for_the_ranks_of_the_answer_alone():
    """Else a table would depend on which runs had ended by then."""
    moment = torch.eye(24) + torch.ones(24, 24)  # couples the groups
    floors = RankFloors(torch.randn(16, 24), make_chain(16, 24, "monarch"), moment)
    found = {1: Certified(0.125, 1), 2: Certified(0.0625, 1)}
    certify(floors, [2], [1, 2], 5.0, found)
    assert floors.known.certified == {2: found[2]}
    certify(floors, [2], [1, 2], 60.0, {1: Certified(0.125, 2)})
    assert floors.known.certified[1] == Certified(0.125, 2)
