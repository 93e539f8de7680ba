import torch

import ks
from ks.bounds.plan import make_plan
from ks.bounds.plan_notes import chain_notes, plan_notes
from ks.moments.second_moment import SecondMoment

WEIGHT = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
WEIGHT *= 4 / WEIGHT.norm()  # predicting 0 costs 1


def test_saturation_and_parity_need_no_weight():
    chain = ks.make_chain(16, 24)
    saturation, parity = chain_notes(chain)
    assert saturation == f"saturation: from rank {chain.saturation_rank} on, more rank changes nothing"
    assert parity == f"parity: from rank {chain.parity_rank()} on, the chain has as many parameters as the dense weight"
    assert plan_notes(make_plan(WEIGHT, chain)) == [saturation, parity]


def test_the_target_names_one_rank_where_the_floor_is_exact_and_two_where_it_is_not():
    exact = make_plan(WEIGHT, ks.make_chain(16, 24))
    smallest = next(floor.rank for floor in exact.floors([1, 2, 3, 4]) if floor.lower <= 0.3)
    said = f"target 0.3, for isotropic inputs: rank {smallest} is the smallest that reaches it"
    assert plan_notes(exact, 0.3)[-1] == said
    weight, chain = torch.eye(32), ks.make_chain(32, 32, "butterfly")
    coupled = make_plan(weight, chain, SecondMoment(torch.full((32, 32), 0.5).double() + 0.5 * torch.eye(32)))
    target = (coupled.bounds.lower(1) + coupled.bounds.upper(1)) / 2
    assert plan_notes(coupled, target)[-1] == (
        f"target {target:g}, for the measured inputs: no rank below 1 can reach it; the best known chain does at rank 2"
    )


def test_a_family_without_floor_says_why_and_names_no_rank():
    chain = ks.make_chain(16, 24, "lowrank_butterfly")
    assert plan_notes(make_plan(WEIGHT, chain), 0.5) == chain_notes(chain)
    assert chain_notes(chain)[-1].startswith("no floor: ")
