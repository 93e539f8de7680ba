"""Several studies beside each other: what compares, who reached the target, and where the runs took place."""

import dataclasses

import pytest
from drawn_study import DIVERGED, make_study, texts

from ks.files.atomic import write_csv, write_json
from ks.files.layout import SweepFiles, run_files
from ks.report.comparison import findings, machines_of, shared_columns, study_row, what_compares
from ks.report.figures.draw import chains_figures


def study_of(name, ranks=(2, 4), summary=None, sha256="a", **described):
    study = make_study(list(ranks), weight={"sha256": sha256}, **described)
    return dataclasses.replace(study, name=name, summary=study.summary.assign(**summary or {}))


def findings_of(*studies):
    return findings(studies, [study_row(study) for study in studies])


def test_studies_of_one_weight_and_one_target_open_with_the_smallest_chain_that_reaches_it():
    target = 0.5
    studies = [
        study_of("few", (1, 2), {"reached_target": False}, target=target),
        study_of("large", (8,), {"reached_target": True}, target=target),
        study_of("small", (4,), {"reached_target": True, "relative_loss": 0.4}, target=target),
    ]
    share = studies[2].rows[0]["share_of_dense"]
    assert findings_of(*studies) == [
        f"The smallest trained chain that loses at most 50% of the output energy has {share:.2%} of the parameters "
        "of the dense weight: small (rank 4)."
    ]
    assert findings_of(studies[0])[0] == "No study reaches the target of 50% of the output energy."
    other = study_of("large", (8,), {"reached_target": True}, "b", target=target)
    assert findings_of(studies[0], other) == ["2 studies of 2 weights.", "Targets that are reached: 1 of 2."]


@pytest.mark.parametrize(
    ("losses", "sizes", "sentence"),
    [
        ((0.4, 0.41), (1000, 1000), "At equal size (1,000 parameters), small loses least: 40% of the output energy "
         "(rank 4); large 41% (rank 4)."),
        ((0.41, 0.4), (1000, 1020), "At equal size (1,000 to 1,020 parameters), large loses least: 40% of the output "
         "energy (rank 4); small 41% (rank 4)."),
        ((0.4, 0.403), (1000, 1000), "At equal size (1,000 parameters), losses are equal within 0.30% of the output "
         "energy: small 40% (rank 4); large 40.30% (rank 4)."),
        ((0.4, 0.41), (1000, 1100), "No ranks of equal size were trained in every study, so their losses show no "
         "better one."),
    ],
)  # fmt: skip
def test_the_headline_compares_at_equal_size_and_not_the_largest_ranks(losses, sizes, sentence):
    small, large = (
        study_of(name, ranks, {"relative_loss": found, "parameters": held}, target=0.5 if name == "large" else None)
        for name, ranks, found, held in (
            ("small", (2, 4), (0.9, losses[0]), (500, sizes[0])),
            ("large", (4, 8), (losses[1], 0.1), (sizes[1], 9000)),
        )
    )
    assert findings_of(small, large)[0] == sentence
    assert texts(chains_figures([small, large])["chains"])[0].replace("\n", " ") == sentence[:-1]


def test_a_run_that_failed_is_in_the_findings_and_in_its_row():
    failed = study_of("b", endings={4: DIVERGED})
    assert findings_of(study_of("a"), failed)[1] == "Not every run ended well: b, rank 4: diverged."
    assert study_row(failed)["runs"] == "1 ok, 1 diverged"


@pytest.mark.parametrize(
    ("summary", "described", "sentence"),
    [
        ({}, {"sha256": "b"}, "Only sizes and relative losses compare"),
        ({"loss_metric": "model_loss"}, {}, "by output energy and by the loss of the model do not compare"),
        ({"inputs": "isotropic"}, {}, "under isotropic inputs and under measured ones do not compare"),
        ({"inputs": "measured 13"}, {}, "The inputs were measured on different data"),
        ({}, {"criterion": "another"}, "Not in a figure, without a relative loss: b."),
    ],
)
def test_what_does_not_compare_is_stated(summary, described, sentence):
    first = study_of("a", summary={"inputs": "measured 12"})
    assert sentence in " ".join(what_compares([first, study_of("b", summary=summary, **described)]))
    assert what_compares([first, first]) == [
        "One weight and the same inputs: losses compare at equal parameters. Equal ranks of two families differ in "
        "size."
    ]


def test_machines_and_times_are_those_of_the_runs(tmp_path):
    files = SweepFiles(tmp_path, "p")
    for rank, host, device in ((2, "n1", "cpu"), (4, "n2", "cpu"), (8, "n3", "cuda:0")):
        run = run_files(tmp_path, rank, 0, 0)
        run.directory.mkdir()
        where = {"host": host, "cpu": "A CPU", "gpu": "A GPU", "threads": 1}
        write_json(run.config, {"settings": {"device": device}, "provenance": where})
    runs = [{"rank": 2, "status": "ok", "train_seconds": 1.5}, {"rank": 4, "status": "ok", "train_seconds": 4.0}]
    copied = {"rank": 8, "status": "ok (as rank 4)", "train_seconds": 4.0}
    rows = [row | {"seed": 0} for row in (*runs, copied, {"rank": 16, "status": "not started"})]
    write_csv(files.runs_csv, ["rank", "seed", "status", "train_seconds"], rows)
    study = study_of("a", (2, 4, 8), files=files)
    assert machines_of(study) == ["n1, n2: A CPU, 1 thread", "n3: A GPU, 1 thread"]
    row = study_row(study)
    assert (row["train_seconds"], row["longest_run"], row["runs"]) == (5.5, "rank 4: 4.0 s", "2 ok, 1 not started")


def test_only_texts_that_every_study_has_are_left_out_of_the_table():
    rows = [study_row(study) for study in (study_of("a"), study_of("b", chain="another"))]
    assert shared_columns(rows).keys() >= {"loss", "verdicts"}
    assert not {"study", "chain", "rank", "target"} & shared_columns(rows).keys()
