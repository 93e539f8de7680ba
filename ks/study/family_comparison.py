"""The quickest answer about one weight: which family of chains and which rank, by bounds alone, without any run."""

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ks.bounds.rank_floors import RankFloors, TargetRanks
from ks.chain.patterns import Chain
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.cli.parser import command_line
from ks.files.columns import FAMILIES, Column, Text
from ks.files.table import filled, table
from ks.model.layer_weights import select_weights
from ks.report.words import Words, percents
from ks.study.study_floors import plan_floors
from ks.training.problem import relative_target, resolve

FRACTIONS = (0.05, 0.1, 0.25, 0.5)  # of the dense parameters, at which families are compared without a target


@dataclass(frozen=True)
class AtSize:
    """The best known chain of a family with at most a fraction of the dense parameters; no rank if none is so small."""

    fraction: float
    rank: int
    loss: float


def compares_families(config: SweepConfig) -> bool:
    """Return whether a dry run asks for nothing but the best of several families for one weight."""
    choice = config.of_layer(None, chains=config.chains, weight_key=config.weight_key)
    if not config.dry_run or not config.chains or choice != config:
        return False
    return len(select_weights(config.weight_path, config.weight_key or "**", config.transpose).weights) == 1


def compare_families(config: SweepConfig) -> str:
    """Return which family has the smallest chain for the target, else which loses least at a few sizes.

    Bounds that the results folder holds are not computed again; nothing is written.

    Raises:
        UsageError: a weight or inputs that cannot be studied.
    """
    alone = config.of_layer(config.weight_key[0] if config.weight_key else None, dry_run=False)
    problems = [resolve(dataclasses.replace(alone, chain=family)) for family in config.chains or ()]
    target, family = relative_target(config, problems[0]), problems[0].chain.family
    found = [plan_floors(config, problem) for problem in problems]
    for text in problems[0].layer_inputs.notes:
        console.note(text, config.quiet)
    words = Words(problems[0].loss_metric, problems[0].unit, problems[0].predict_zero_loss)
    if target is None:
        sizes = [(floors.chain, [_at_size(floors, size) for size in FRACTIONS]) for floors in found]
        text = families_by_size(sizes, words)
    else:
        reaching = [(floors.chain, floors.target_ranks(target)) for floors in found]
        text, family = families_at_target(reaching, words), _smallest(reaching)[0].family
    command = command_line("rank_sweep_study.py", dataclasses.replace(alone, chain=family))
    return f"{text}\n\nNothing was trained or written. To train {family} chains: {command}"


def _at_size(floors: RankFloors, fraction: float) -> AtSize:
    """Return the loss of the largest rank that is small enough; parameters grow with the rank."""
    chain = floors.chain
    ranks = range(1, chain.saturation_rank + 1)
    rank = bisect_right(ranks, fraction * chain.rows * chain.cols, key=chain.parameters)
    return AtSize(fraction, rank, floors.upper(rank) if rank else 1.0)


def families_at_target(found: Sequence[tuple[Chain, TargetRanks]], words: Words) -> str:
    """Return the smallest chain that reaches a target, and those of the other families in a table."""
    chain, ranks = _smallest(found)
    parameters, dense = chain.parameters(ranks.reaching), chain.rows * chain.cols
    loss, limit = words.amounts(ranks.loss, ranks.target)
    sentences = [
        f"To {words.lose} at most {words.whole(limit)}, {chain.family} of rank {ranks.reaching} needs the fewest "
        f"parameters: {percents(parameters / dense)[0]} of the dense weight. It {words.may_lose} {loss}."
    ]
    if parameters >= dense:
        sentences = [f"No family is known to reach {words.whole(limit)} with fewer parameters than dense."]
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
            "none_below": its.none_below,
            "relative_loss": its.loss,
        }
        for family, its in found
    ]
    return "\n".join([*filled(sentences), "", table(words.with_units(FAMILIES), map(words.in_its_unit, rows))])


def _smallest(found: Sequence[tuple[Chain, TargetRanks]]) -> tuple[Chain, TargetRanks]:
    return min(found, key=lambda one: one[0].parameters(one[1].reaching))


def families_by_size(found: Sequence[tuple[Chain, Sequence[AtSize]]], words: Words) -> str:
    """Return the family that loses least at each size, and the losses of all in a table."""
    best: dict[str, list[str]] = {}
    for at in zip(*(sizes for _, sizes in found), strict=True):
        if any(one.rank for one in at):
            winner = min(range(len(at)), key=lambda index: at[index].loss)
            best.setdefault(found[winner][0].family, []).append(f"{at[0].fraction:.0%}")
    texts = []
    for family, sizes in best.items():
        others = ", ".join(sizes[:-1])
        texts.append(f"{family} {words.loses} least with {f'{others} and ' if others else ''}{sizes[-1]}")
    sentence = f"{'; '.join(texts)} of the parameters of the dense weight."
    names = [f"{one.fraction:.0%} of dense" for one in found[0][1]]
    rows = [
        {"chain": chain.family}
        | {
            name: f"{words.amounts(one.loss)[0]} (rank {one.rank})" if one.rank else "no rank so small"
            for name, one in zip(names, sizes)
        }
        for chain, sizes in found
    ]
    shown = table([FAMILIES[0], *(Column(name, Text, "loss and rank at this size") for name in names)], rows)
    return "\n".join([*filled([sentence[0].upper() + sentence[1:]]), "", shown])
