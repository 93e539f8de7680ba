import torch
from study_rows import CHAIN

import ks
from ks.bounds.plan import make_plan
from ks.report.plan_table import plan_notes, plan_table


def unit_weight(weight):
    """Return a weight scaled so that predicting 0 costs 1."""
    return weight * (len(weight) ** 0.5 / weight.norm())


def test_the_plan_in_words():
    weight = unit_weight(torch.eye(16, 24))
    plan = make_plan(weight, ks.make_chain(16, 24, "butterfly"))
    notes = plan_notes(plan, 0.5)
    assert notes[0].startswith("saturation: from rank")
    assert any(note.startswith("target 0.5") for note in notes)
    none = make_plan(weight, ks.make_chain(16, 24, "lowrank_butterfly"))
    assert "no floor" in plan_notes(none, 0.5)[-1]
    assert none.floors([2]) == [None]


def test_the_plan_as_a_table():
    weight = unit_weight(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)))
    plan = make_plan(weight, CHAIN)
    floors = dict(zip((2, 9), plan.floors([2, 9])))
    header, two, nine = plan_table(CHAIN, floors).splitlines()
    assert header.split()[:2] == ["rank", "parameters"]
    assert f"{floors[2].lower:.2%}" in two.split()
    assert "83.33%" in two
    assert nine.endswith("saturated, larger than dense")
    assert "energy lost" not in plan_table(CHAIN, {2: None})
    header, *_ = plan_table(CHAIN, floors, torch.linspace(1, 0, 9)).splitlines()
    assert "if isotropic" in header
