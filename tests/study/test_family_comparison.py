"""The family that is smallest for a target, or loses least at a size, as text."""

from ks.bounds.rank_floors import TargetRanks
from ks.chain.patterns import make_chain
from ks.report.words import Words
from ks.study.family_comparison import AtSize, families_at_target, families_by_size

MONARCH, LOWRANK = make_chain(64, 96), make_chain(64, 96, "lowrank")  # 640 and 160 parameters a rank, dense has 6144


def test_the_smallest_chain_for_a_target_is_the_answer():
    monarch, lowrank = TargetRanks(0.1, 2, 3, 0.09, False), TargetRanks(0.1, 9, 9, 0.095, True)
    first, *_ = families_at_target([(MONARCH, monarch), (LOWRANK, lowrank)], Words()).split("\n\n")
    assert " ".join(first.split()) == (
        "To lose at most 10% of the output energy, lowrank of rank 9 needs the fewest parameters: 23.44% of the dense "
        "weight. It loses 9.50%. Whether monarch needs fewer is not known: no rank below 2 can reach the target, and "
        "the best known chain does at rank 3."
    )
    proven = TargetRanks(0.1, 3, 3, 0.09, False)
    text = families_at_target([(MONARCH, proven), (LOWRANK, lowrank)], Words())
    assert "not known" not in text
    assert text.splitlines()[-3].split() == ["lowrank", "9", "1,440", "23.44%", "9.50%", "9"]


def test_a_target_that_needs_more_than_the_dense_weight_names_no_chain():
    found = [(LOWRANK, TargetRanks(0.01, 50, 50, 0.0099, True))]
    assert families_at_target(found, Words()).startswith(
        "No family is known to reach 1% of the output energy with fewer"
    )


def test_without_a_target_the_family_that_loses_least_is_named_for_each_size():
    sizes = [[AtSize(0.1, 0, 1.0), AtSize(0.5, 4, 0.2)], [AtSize(0.1, 3, 0.5), AtSize(0.5, 19, 0.3)]]
    first, table = families_by_size(list(zip((MONARCH, LOWRANK), sizes)), Words()).split("\n\n")
    assert first == "Lowrank loses least with 10%; monarch loses least with 50% of the parameters of the dense weight."
    assert table.splitlines()[1].split() == ["monarch", "no", "rank", "so", "small", "20%", "(rank", "4)"]
