import pytest
from study_rows import CHAIN, CURVES

from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import write_csv, write_json
from ks.files.curves import write_curves
from ks.files.layout import SweepFiles, run_files
from ks.files.status import OK, Ending, Status
from ks.report.read_results import read_study
from ks.report.summary import rank_row, run_row, write_summary

DIVERGED = Ending(Status.DIVERGED)


@pytest.fixture
def folder(tmp_path):
    """A study of ranks 2 and 4 with seeds 7 and 8 in a folder that also holds another rank and another seed."""
    files = SweepFiles(tmp_path, "p")
    endings = {(2, 7): OK, (2, 8): DIVERGED, (4, 7): DIVERGED, (4, 8): DIVERGED}
    runs = [run_row(rank, CURVES, ending, seed) for (rank, seed), ending in endings.items()]
    for rank, seed in (*endings, (2, 9), (16, 7)):
        run = run_files(tmp_path, rank, seed, 7)
        run.directory.mkdir(parents=True)
        write_curves(run, [row | {"rank": rank} for row in CURVES])
    rows = [rank_row(runs[:2], CHAIN), rank_row(runs[2:], CHAIN)]
    write_csv(files.runs_csv, columns.names(columns.RUNS), runs)
    write_summary(files, rows)
    return files


def test_a_study_is_read_without_the_runs_of_other_studies(folder):
    """Failed runs are drawn only for ranks of which no seed finished."""
    record = {"settings": {}, "ranks": [2, 4], "seeds": [7, 8], "title": "T", "problem": {"chain": "monarch"}}
    write_json(folder.config, record)
    study = read_study(folder)
    assert list(study.summary["rank"]) == [2, 4]
    assert list(study.summary["status"]) == ["diverged (1 of 2 seeds)", "diverged (2 of 2 seeds)"]
    assert list(study.curves.groupby(["rank", "seed"]).groups) == [(2, 7), (4, 7), (4, 8)]
    assert (study.config.title, study.config.problem.chain) == ("T", "monarch")
    assert (len(study.floor), list(study.floor)) == (0, columns.names(columns.FLOOR))


OWN = "mean squared error per output"


@pytest.mark.parametrize(
    ("settings", "loss", "label"),
    [
        ({}, None, OWN),
        ({}, "quadratic criterion", "quadratic criterion"),  # of an earlier version
        ({"criterion": "mean_squared_error"}, None, OWN),
        ({"criterion": "l1_loss of torch 2.13.0"}, None, "loss, l1_loss"),
        ({"criterion": "user-defined sha256 0123456789abcdef"}, None, "loss, user-defined"),
    ],
)  # fmt: skip
def test_the_label_of_the_losses_is_that_of_the_criterion(folder, settings, loss, label):
    write_json(folder.config, {"settings": settings, "ranks": [2], "seeds": [7], "loss": loss})
    assert read_study(folder).loss_label == label


def test_metrics_are_read_back_from_curves_and_summary(folder):
    """One run has a metric, another one none."""
    run = run_files(folder.directory, 2, 7, 7)
    write_curves(run, [row | {"r2": 0.5, "never": None} for row in CURVES])
    row = rank_row([run_row(2, CURVES, OK, 7) | {"final_r2": 0.5, "best_r2": 0.25}], CHAIN)
    write_summary(folder, [row, rank_row([run_row(4, CURVES)], CHAIN)])
    write_json(folder.config, {"settings": {}, "ranks": [2], "seeds": [7, 8]})
    study = read_study(folder)
    assert study.metrics == ["r2"]
    assert list(study.summary.columns[-2:]) == ["final_r2", "best_r2"]
    assert study.summary.iloc[0][["final_r2", "best_r2"]].tolist() == [0.5, 0.25]
    assert study.summary["final_r2"].isna().tolist() == [False, True]
    assert study.unknown_metrics(["r2"]) == ""
    assert study.unknown_metrics(["r2", "rank"]).endswith("has values of that name; it has r2")


def test_what_is_no_study_is_one_line(tmp_path, folder):
    for files, message in (
        (SweepFiles(tmp_path / "absent", "p"), "no such folder"),
        (SweepFiles(tmp_path, "q"), "has no q_summary.json; give --save_prefix: p"),
        (SweepFiles(tmp_path / "rank_16", "p"), "holds no results"),
    ):
        with pytest.raises(UsageError, match=message):
            read_study(files)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, text) for name in ("runs_csv", "floor_csv") for text in (b"", b"\xff\xfe\x00\x80", b"a,b\n1,2\n")),
        *(("summary_json", text) for text in (b"[1, 2]", b'{"rank": 2}', b'[{"rank": 2}, {"status": "ok"}]')),
    ],
)
def test_a_damaged_table_is_one_line_with_its_name(folder, name, content):
    write_json(folder.config, {"settings": {}, "ranks": [2], "seeds": [7, 8]})
    path = getattr(folder, name)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read|lacks the columns|is not valid") as raised:
        read_study(folder)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)
