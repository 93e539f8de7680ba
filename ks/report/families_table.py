"""Which family of chains is smallest for a target, or loses least at a size: one sentence and a small table."""

from collections.abc import Sequence
from dataclasses import dataclass

from ks.bounds.rank_floors import TargetRanks
from ks.chain.patterns import Chain
from ks.files.columns import FAMILIES, Column, Text
from ks.files.table import filled, table
from ks.report.answer import percents


@dataclass(frozen=True)
class AtSize:
    """The best known chain of a family with at most a fraction of the dense parameters; no rank if none is so small."""

    fraction: float
    rank: int
    loss: float


def families_at_target(found: Sequence[tuple[Chain, TargetRanks]]) -> str:
    """Return the smallest chain that reaches a target, and those of the other families in a table."""
    chain, ranks = min(found, key=lambda one: one[0].parameters(one[1].reaching))
    parameters, dense = chain.parameters(ranks.reaching), chain.rows * chain.cols
    loss, limit, size = percents(ranks.loss, ranks.target, parameters / dense)
    sentences = [
        f"To lose at most {limit} of the output energy, {chain.family} of rank {ranks.reaching} needs the fewest "
        f"parameters: {size} of the dense weight. It loses {loss}."
    ]
    if parameters >= dense:
        sentences = [f"No family is known to reach {limit} of the output energy with fewer parameters than dense."]
    for other, its in found:
        if other != chain and other.parameters(its.none_below) < parameters:
            sentences.append(
                f"Whether {other.family} needs fewer is not known: no rank below {its.none_below} can reach the "
                f"target, and the best known chain does at rank {its.reaching}."
            )
    rows = [
        {
            "chain": family.family,
            "rank": its.reaching,
            "parameters": family.parameters(its.reaching),
            "share_of_dense": family.parameters(its.reaching) / dense,
            "relative_loss": its.loss,
            "none_below": its.none_below,
        }
        for family, its in found
    ]
    return "\n".join([*filled(sentences), "", table(FAMILIES, rows)])


def families_by_size(found: Sequence[tuple[Chain, Sequence[AtSize]]]) -> str:
    """Return the family that loses least at each size, and the losses of all in a table."""
    best: dict[str, list[str]] = {}
    for at in zip(*(sizes for _, sizes in found), strict=True):
        if any(one.rank for one in at):
            winner = min(range(len(at)), key=lambda index: at[index].loss)
            best.setdefault(found[winner][0].family, []).append(f"{at[0].fraction:.0%}")
    texts = [f"{family} loses least with {_listed(sizes)}" for family, sizes in best.items()]
    sentence = f"{'; '.join(texts)} of the parameters of the dense weight."
    names = [f"{one.fraction:.0%} of dense" for one in found[0][1]]
    rows = [
        {"chain": chain.family}
        | {
            name: f"{one.loss:.2%} (rank {one.rank})" if one.rank else "no rank so small"
            for name, one in zip(names, sizes)
        }
        for chain, sizes in found
    ]
    shown = table([FAMILIES[0], *(Column(name, Text, "loss and rank at this size") for name in names)], rows)
    return "\n".join([*filled([sentence[0].upper() + sentence[1:]]), "", shown])


def _listed(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
