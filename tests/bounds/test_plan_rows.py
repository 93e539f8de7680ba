"""Floors as rows: of the file of a study, and of the table that --dry_run prints."""

import pytest
import torch

import ks
from ks.bounds.rank_floors import RankFloors, floor_rows, plan_rows
from ks.files import columns
from ks.files.table import table

CHAIN = ks.make_chain(16, 24)
WEIGHT = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
WEIGHT *= 16**0.5 / WEIGHT.norm()  # the zero predictor costs 1


def test_floors_on_disk_are_in_the_units_of_the_loss():
    weight, sigma = 100 * WEIGHT.double(), 3.0
    predict_zero = sigma**2 * weight.square().sum().item() / 16
    plan = RankFloors(sigma * weight / predict_zero**0.5, CHAIN)
    values = ks.KSLinear.from_dense(weight, rank=2)
    expected = sigma**2 * (weight - values.to_dense()).square().sum().item() / 16
    (row,) = [row for row in floor_rows(plan, predict_zero) if (row["chain"], row["rank"]) == ("monarch", 2)]
    assert row["loss_floor"] == pytest.approx(expected, rel=1e-6)
    assert row["relative_loss"] == pytest.approx(expected / predict_zero, rel=1e-6)
    assert plan.floor(2).lower == row["relative_loss"]
    assert plan.curve[0].item() == pytest.approx(1)
    assert list(row) == columns.names(columns.FLOOR)
    none = RankFloors(WEIGHT, ks.make_chain(16, 24, "lowrank_butterfly"))
    assert floor_rows(none, 1.0) == []


def test_the_plan_as_a_table():
    plan = RankFloors(WEIGHT, CHAIN)
    floors = plan.floors([2, 9])
    above, header, two, nine, *legend = table(columns.PLANNED_RANKS, plan_rows(plan, floors)).splitlines()
    assert header.split() == ["rank", "floor", "floor", "rank", "parameters", "of_dense", "remarks"]
    assert above.split() == ["relative_", "lowrank_", "lowrank_", "share_"]
    lowrank = plan.family_curves()[1][1][8].item()  # 320 parameters are those of rank 8
    assert two.split() == ["2", f"{floors[2].lower:.2%}", f"{lowrank:.2%}", "8", "320", "83.33%", "-"]
    assert nine.endswith("saturated, larger than dense")
    assert legend[1].startswith("lowrank_floor: the same for a low-rank factorisation")
    assert "(1, 4, 8, 4) (4, 8, 6, 1)" in table(columns.PATTERNS, plan_rows(plan, floors))
    plan.isotropic_weight = lambda: WEIGHT
    assert "isotropic_" in table(columns.PLANNED_RANKS, plan_rows(plan, floors))


def test_the_plan_of_low_rank_or_of_a_chain_without_a_floor_has_fewer_columns():
    lowrank = RankFloors(WEIGHT, ks.make_chain(16, 24, "lowrank"))
    assert "lowrank_" not in table(columns.PLANNED_RANKS, plan_rows(lowrank, lowrank.floors([2])))
    none = RankFloors(WEIGHT, ks.make_chain(16, 24, "lowrank_butterfly"))
    assert "floor" not in table(columns.PLANNED_RANKS, plan_rows(none, {2: None}))
