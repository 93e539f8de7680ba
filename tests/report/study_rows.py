"""A chain, curves of two epochs, and a row of the summary made from them, for the tests of this folder."""

import math

import ks
from ks.bounds.floors import Floor
from ks.files.status import OK
from ks.report.summary import Reference, rank_row, run_row

CHAIN = ks.make_chain(16, 24)
CURVES = [
    {"epoch": 1, "train_loss": 0.3, "val_loss": 0.1 + 0.2, "rank": 2, "population_loss": math.nan},
    {"epoch": 2, "train_loss": 0.25, "val_loss": 0.35, "rank": 2, "population_loss": 0.26},
]


def make_row(population=0.26, train=0.25, lower=0.2, upper=None, rank=2, predict_zero=1.0, ending=OK, chain=CHAIN):
    """Return the row of a rank with one seed; losses and bounds are in the unit of `predict_zero`."""
    curves = [CURVES[1] | {"train_loss": train, "population_loss": population}]
    floor = Floor(rank, lower / predict_zero, (upper or lower) / predict_zero, upper is None)
    return rank_row([run_row(rank, curves, ending)], chain, floor, Reference(predict_zero))
