import torch
from study_rows import CHAIN, CURVES, make_row

import ks
from ks.bounds.floors import Floor
from ks.bounds.rank_floors import RankFloors, plan_rows
from ks.files import columns
from ks.files.atomic import read_json, write_json
from ks.files.status import Ending, Status
from ks.report.summary import Reference, rank_row, run_row
from ks.report.tables import plan_table, summary_columns, summary_table


def whole_row():
    """A row with two bounds, measured inputs, several seeds and a known duration, so that no column is left out."""
    curves = [[CURVES[1] | {"population_loss": loss}] for loss in (0.26, 0.36)]
    runs = [run_row(2, rows, seed=seed, train_seconds=1.25) for seed, rows in enumerate(curves)]
    measured = Reference(1.0, held_out_predict_zero_loss=1.1, held_out_count=100, isotropic_floors=[1.0] * 9)
    return rank_row(runs, CHAIN, Floor(2, 0.1, 0.2, False), measured) | {"status": "ok (copy of rank 1)"}


def test_the_printed_summary_has_the_columns_that_decide_then_the_details_in_their_forms():
    row = whole_row() | {"final_cosine": 0.123456, "best_cosine": 0.5}
    assert columns.names(summary_columns([row])) == [*columns.PRINTED]
    detailed = summary_table([row], verbose=True)
    assert detailed.startswith(summary_table([row]))
    assert "0.1235" in detailed
    for column in columns.chosen(columns.SUMMARY, (*columns.PRINTED, *columns.DETAILS)):
        assert {*column.form.format(row[column.name]).split()} <= {*detailed.split()}
    assert max(map(len, detailed.splitlines())) <= 100


def test_columns_that_say_nothing_are_left_out():
    assert not {"relative_floor_upper", "status"} & {*columns.names(summary_columns([make_row()]))}
    rows = [make_row(upper=0.22), make_row(ending=Ending(Status.FAILED, "exit 1"))]
    assert {"relative_floor_upper", "status"} <= {*columns.names(summary_columns(rows))}
    assert "failed (exit 1)" in summary_table(rows)
    assert "verdict" not in summary_table([rank_row([run_row(1, CURVES)], CHAIN)])


def test_without_a_relative_loss_the_final_losses_are_printed():
    above, header, values = summary_table([rank_row([run_row(1, CURVES)])]).splitlines()
    assert (header.split(), values.split()) == (["rank", "val_loss", "train_loss"], ["1", "0.35", "0.25"])
    assert above.split() == ["final_", "final_"]


def test_a_summary_read_from_its_file_is_printed_as_the_one_in_memory(tmp_path):
    rows = [make_row(), make_row(rank=4), make_row(ending=Ending(Status.DIVERGED))]
    names = columns.names(columns.SUMMARY)
    write_json(tmp_path / "s.json", [{name: row.get(name) for name in names} for row in rows])
    assert summary_table(read_json(tmp_path / "s.json")) == summary_table(rows)


def test_the_plan_as_a_table():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    plan = RankFloors(weight * (16**0.5 / weight.norm()), CHAIN)  # the zero predictor costs 1
    floors = plan.floors([2, 9])
    above, header, two, nine, *legend = plan_table(plan_rows(plan, floors)).splitlines()
    assert header.split() == ["rank", "floor", "floor", "rank", "parameters", "of_dense", "remarks"]
    assert above.split() == ["relative_", "lowrank_", "lowrank_", "share_"]
    lowrank = plan.family_curves()[1][1][8].item()  # 320 parameters are those of rank 8
    assert two.split() == ["2", f"{floors[2].lower:.2%}", f"{lowrank:.2%}", "8", "320", "83.33%", "-"]
    assert nine.endswith("saturated, larger than dense")
    assert legend[1].startswith("lowrank_floor: the same for a low-rank factorisation")
    assert "(1, 4, 8, 4) (4, 8, 6, 1)" in plan_table(plan_rows(plan, floors), verbose=True)
    plan.isotropic_weight = lambda: weight
    assert "isotropic_" in plan_table(plan_rows(plan, floors))


def test_the_plan_of_low_rank_or_of_a_chain_without_a_floor_has_fewer_columns():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    weight *= 16**0.5 / weight.norm()
    lowrank = RankFloors(weight, ks.make_chain(16, 24, "lowrank"))
    assert "lowrank_" not in plan_table(plan_rows(lowrank, lowrank.floors([2])))
    none = RankFloors(weight, ks.make_chain(16, 24, "lowrank_butterfly"))
    assert "floor" not in plan_table(plan_rows(none, {2: None}))
