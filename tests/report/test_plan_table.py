import torch
from study_rows import CHAIN

from ks.bounds.plan import make_plan
from ks.report.plan_table import plan_table


def test_the_plan_as_a_table():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    plan = make_plan(weight * (16**0.5 / weight.norm()), CHAIN)  # predicting 0 costs 1
    floors = dict(zip((2, 9), plan.floors([2, 9])))
    header, two, nine = plan_table(CHAIN, floors).splitlines()
    assert header.split()[:2] == ["rank", "parameters"]
    assert f"{floors[2].lower:.2%}" in two.split()
    assert "83.33%" in two
    assert nine.endswith("saturated, larger than dense")
    assert "energy lost" not in plan_table(CHAIN, {2: None})
    header, *_ = plan_table(CHAIN, floors, torch.linspace(1, 0, 9)).splitlines()
    assert "if isotropic" in header
