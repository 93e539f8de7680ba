"""Studies to draw, with curves that fall towards the floors of a random weight."""

import dataclasses
from pathlib import Path

import pandas as pd
import torch

import ks
from ks.bounds.floors import Floor
from ks.bounds.rank_floors import RankFloors, floor_rows
from ks.files import columns
from ks.files.layout import SweepFiles
from ks.files.schema import StudyRecord, convert
from ks.files.status import OK, Ending, Status
from ks.model.model_plan import LayerPlan, ModelPlan
from ks.moments.metric import LossMetric
from ks.report.read_results import Study
from ks.report.summary import Reference, rank_row, run_row, written_columns

WEIGHT = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
CHAIN = ks.make_chain(64, 96)
PLAN = RankFloors(WEIGHT * 8 / WEIGHT.norm(), CHAIN)
PREDICT_ZERO = 2.0
FILES = SweepFiles(Path("no such folder"), "p")
DIVERGED = Ending(Status.DIVERGED)


def make_study(
    ranks, num_epochs=10, level=1.1, endings=None, seeds=(None,), spread=1.0, times=None, target=None,
    criterion="mean_squared_error", title="title", answer=(), files=FILES, **problem
):  # fmt: skip
    """Return a study whose curves fall towards `level` times the upper bound of each rank.

    Args:
        spread: the upper bound of each floor over the lower one.
        times: milliseconds of chain and dense at every batch size, by rank.
        problem: of its record.
    """
    epochs, rows = [], []
    for rank, exact in PLAN.floors(ranks).items():
        floor = Floor(rank, exact.lower, exact.lower * spread, spread == 1.0)
        runs = []
        for index, seed in enumerate(seeds):
            least = floor.upper * PREDICT_ZERO * level * (1 + 0.01 * index)
            values = [least + 1 / (epoch + 1) for epoch in range(1, num_epochs + 1)]
            runs.append([
                {"epoch": epoch, "train_loss": loss, "val_loss": 1.01 * loss, "rank": rank, "population_loss": loss}
                for epoch, loss in enumerate(values, 1)
            ])  # fmt: skip
            epochs += [row | {"seed": seed} for row in runs[-1]]
        ending = (endings or {}).get(rank, OK)
        run_rows = [run_row(rank, run if ending == OK else [], ending) for run in runs]
        row = rank_row(run_rows, CHAIN, floor, Reference(PREDICT_ZERO, target=target))
        for batch in columns.BATCHES if times else ():
            row[f"latency_ms_batch_{batch}"], row[f"dense_latency_ms_batch_{batch}"] = times[rank]
        rows.append(row)
    floors = pd.DataFrame(floor_rows(PLAN, PREDICT_ZERO), columns=columns.names(columns.FLOOR))
    problem = {"chain": CHAIN.describe(), "predict_zero_loss": PREDICT_ZERO} | problem
    record = {"settings": {"criterion": criterion}, "ranks": [*ranks], "seeds": [0], "title": title, "answer": answer}
    config = convert(record | {"problem": problem}, StudyRecord, "a test")
    summary = pd.DataFrame(rows, columns=written_columns(rows))
    return Study("study", pd.DataFrame(epochs), summary, floors, files, config)


def make_plan(rank, predicted, measured, equal_predicted, equal_measured, unit="nats"):
    """Return a plan of one layer of rank `rank` of 32 × 32, of which dense has 16 ranks' parameters."""
    layer = LayerPlan("a.weight", 32, 32, "0" * 64, ks.make_chain(32, 32, "lowrank"), rank, loss_increase=predicted)
    uniform = (dataclasses.replace(layer, loss_increase=equal_predicted),)
    plan = ModelPlan((layer,), "budget", 0.5, 0.0, uniform, loss_metric=LossMetric.MODEL_LOSS, unit=unit)
    return plan.measured(measured, equal_measured)


def texts(figure):
    """Return the texts in a figure, of all its panels and above them."""
    return [text.get_text() for text in [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]]
