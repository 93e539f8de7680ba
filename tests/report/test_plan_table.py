import torch
from study_rows import CHAIN

from ks.bounds.rank_floors import RankFloors, TargetRanks
from ks.chain.patterns import make_chain
from ks.report.plan_table import plan_table, target_note


def test_the_plan_as_a_table():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    plan = RankFloors(weight * (16**0.5 / weight.norm()), CHAIN)  # predicting 0 costs 1
    floors = plan.floors([2, 9])
    above, header, two, nine, *legend = plan_table(plan, floors).splitlines()
    assert header.split() == ["rank", "floor", "floor", "rank", "parameters", "of_dense", "remarks"]
    assert above.split() == ["relative_", "lowrank_", "lowrank_", "share_"]
    lowrank = plan.family_curves()[1][1][8].item()  # 320 parameters are those of rank 8
    assert two.split() == ["2", f"{floors[2].lower:.2%}", f"{lowrank:.2%}", "8", "320", "83.33%"]
    assert nine.endswith("saturated, larger than dense")
    assert legend[1].startswith("lowrank_floor: the same for plain low-rank")
    assert "(1, 4, 8, 4) (4, 8, 6, 1)" in plan_table(plan, floors, verbose=True)
    plan.isotropic_weight = lambda: weight
    assert "isotropic_" in plan_table(plan, floors)


def test_the_plan_of_low_rank_or_of_a_chain_without_a_floor_has_fewer_columns():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    weight *= 16**0.5 / weight.norm()
    lowrank = RankFloors(weight, make_chain(16, 24, "lowrank"))
    assert "lowrank_" not in plan_table(lowrank, lowrank.floors([2]))
    none = RankFloors(weight, make_chain(16, 24, "lowrank_butterfly"))
    assert "floor" not in plan_table(none, {2: None})


def test_the_note_on_a_target_has_one_rank_where_bounds_meet_and_two_where_they_do_not():
    assert target_note(TargetRanks(0.3, 4, 4, 0.29, True), True) == (
        "target 0.3, for isotropic inputs: rank 4 is the smallest that reaches it"
    )
    assert target_note(TargetRanks(0.3, 2, 4, 0.29, False), False) == (
        "target 0.3, for the measured inputs: rank 4 is the smallest whose best known chain reaches it; "
        "no rank below 2 can"
    )
