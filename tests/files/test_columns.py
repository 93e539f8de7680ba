"""The documented columns come first, and what is declared is complete."""

import pytest

from ks.files import columns

TABLES = ("CURVES", "SUMMARY", "RUNS", "ALL_CURVES", "FLOOR", "PLAN")


def test_the_first_columns_are_those_of_the_contract():
    curves, summary = ",".join(columns.names(columns.CURVES)), ",".join(columns.names(columns.SUMMARY))
    assert curves.startswith("epoch,train_loss,val_loss,rank,")
    assert summary.startswith(
        "rank,final_train_loss,final_val_loss,min_train_loss,min_val_loss,min_train_epoch,min_val_epoch,num_epochs,"
    )
    assert columns.names(columns.RUNS)[:2] == ["rank", "seed"]


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_declared_once_and_explained(table):
    declared = getattr(columns, table)
    assert len(set(columns.names(declared))) == len(declared)
    assert all(column.meaning for column in declared)


def test_every_column_of_the_curves_has_a_key_of_its_own():
    plurals = [column.plural for column in columns.CURVES]
    assert None not in plurals
    assert len(set(plurals)) == len(plurals)


def test_what_is_printed_is_declared_and_printed_once():
    printed = [*columns.PRINTED, *columns.DETAILS]
    assert {*printed} <= {*columns.names(columns.SUMMARY)}
    assert len({*printed}) == len(printed)
