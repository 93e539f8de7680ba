import dataclasses

import torch
from study_rows import CHAIN

from ks.bounds.plan import make_plan
from ks.chain.patterns import make_chain
from ks.report.plan_table import plan_table


def test_the_plan_as_a_table():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    plan = make_plan(weight * (16**0.5 / weight.norm()), CHAIN)  # predicting 0 costs 1
    floors = dict(zip((2, 9), plan.floors([2, 9])))
    above, header, two, nine, *legend = plan_table(plan, floors).splitlines()
    assert header.split() == ["rank", "floor", "floor", "rank", "parameters", "of_dense", "remarks"]
    assert above.split() == ["relative_", "lowrank_", "lowrank_", "share_"]
    lowrank = plan.family_curves()[1][1][8].item()  # 320 parameters are those of rank 8
    assert two.split() == ["2", f"{floors[2].lower:.2%}", f"{lowrank:.2%}", "8", "320", "83.33%"]
    assert nine.endswith("saturated, larger than dense")
    assert legend[1].startswith("lowrank_floor: the same for plain low-rank")
    assert "(1, 4, 8, 4) (4, 8, 6, 1)" in plan_table(plan, floors, verbose=True)
    measured = dataclasses.replace(plan, isotropic_curve=torch.linspace(1, 0, 9))
    assert "isotropic_" in plan_table(measured, floors)


def test_the_plan_of_low_rank_or_of_a_chain_without_a_floor_has_fewer_columns():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    weight *= 16**0.5 / weight.norm()
    lowrank = make_plan(weight, make_chain(16, 24, "lowrank"))
    assert "lowrank_" not in plan_table(lowrank, {2: lowrank.floors([2])[0]})
    none = make_plan(weight, make_chain(16, 24, "lowrank_butterfly"))
    assert "floor" not in plan_table(none, {2: None})
