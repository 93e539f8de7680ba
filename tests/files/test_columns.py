"""The documented columns come first, and what is declared is complete."""

import pytest

from ks.errors import UsageError
from ks.files import columns

TABLES = ("CURVES", "SUMMARY", "RUNS", "ALL_CURVES", "FLOOR", "LAYER_FLOORS", "PLAN")


def test_the_first_columns_are_those_of_the_contract():
    curves, summary = ",".join(columns.names(columns.CURVES)), ",".join(columns.names(columns.SUMMARY))
    assert curves.startswith("epoch,train_loss,val_loss,rank,")
    assert summary.startswith(
        "rank,final_train_loss,final_val_loss,min_train_loss,min_val_loss,min_train_epoch,min_val_epoch,num_epochs,"
    )
    assert columns.names(columns.RUNS)[:2] == ["rank", "seed"]


def test_every_column_is_declared_once_and_explained():
    for table in TABLES:
        declared = getattr(columns, table)
        assert len({*columns.names(declared)}) == len(declared), table
        assert all(column.description for column in declared), table
    plurals = [column.plural for column in columns.CURVES]
    assert None not in plurals
    assert len({*plurals}) == len(plurals)


def test_metrics_are_what_is_declared_nowhere():
    rows = [{"epoch": 1, "r2": 0.5}, {"epoch": 2, "cosine": 0.5, "r2": 0.5}]
    assert columns.metric_names(rows) == ["r2", "cosine"]
    row = {"rank": 2, "failed": False, "final_r2": 0.5, "best_r2": 0.4, "final_val_loss": 1.0}
    assert columns.summary_metrics([row]) == ["final_r2", "best_r2"]


def test_names_of_metrics():
    columns.check_metric_names(["r2", "_", "top-5", "error.p99", "Rank", "m" * columns.LONGEST])


@pytest.mark.parametrize(
    "name",
    [
        *("", "2r", "a b", "a/b", "../a", "a\n", "é", "=1+1", "m" * (columns.LONGEST + 1), 7),
        *("rank", "val_loss", "population_loss", "grad_norm"),  # of the curves
        *("epochs", "lrs"),  # of their JSON file
        *("split", "seed", "seconds", "loss"),  # of the long form
        *("val_loss_se", "train_loss_se"),  # of the summary, after final_
    ],
)
def test_a_name_that_is_malformed_or_taken_is_refused_in_one_line(name):
    with pytest.raises(UsageError, match="cannot name a metric") as raised:
        columns.check_metric_names(["r2", name])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250
