"""The quickest answer about one weight: which family of chains and which rank, by bounds alone, without any run."""

import dataclasses
from bisect import bisect_right
from pathlib import Path

from ks.bounds.rank_floors import RankFloors
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.cli.parser import command_line
from ks.errors import UsageError
from ks.files.layout import SweepFiles
from ks.model.layer_weights import select_weights
from ks.report.families_table import AtSize, families_at_target, families_by_size
from ks.study.study_floors import plan_floors
from ks.training.problem import resolve

FRACTIONS = (0.05, 0.1, 0.25, 0.5)  # of the dense parameters, at which families are compared without a target


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
        UsageError: flags that do not go together, or a weight or inputs that cannot be studied.
    """
    if config.chain is not None:
        raise UsageError(f"--chain {config.chain} together with --chains: give one or the other")
    path = SweepFiles(Path(config.output_dir).absolute(), config.save_prefix).bounds
    alone = config.of_layer(config.weight_key[0] if config.weight_key else None, dry_run=False)
    problems = [resolve(dataclasses.replace(alone, chain=family)) for family in config.chains or ()]
    found = [plan_floors(config, problem, path) for problem in problems]
    for text in problems[0].layer_inputs.notes:
        console.note(text, config.quiet)
    target = config.target_relative_loss
    if target is None:
        text = families_by_size([(floors.chain, [_at_size(floors, size) for size in FRACTIONS]) for floors in found])
    else:
        text = families_at_target([(floors.chain, floors.target_ranks(target)) for floors in found])
    command = command_line("rank_sweep_study.py", dataclasses.replace(alone, chain="FAMILY"))
    return f"{text}\n\nNothing was trained or written. To train chains: {command}"


def _at_size(floors: RankFloors, fraction: float) -> AtSize:
    """Return the loss of the largest rank that is small enough; parameters grow with the rank."""
    chain = floors.chain
    ranks = range(1, chain.saturation_rank + 1)
    rank = bisect_right(ranks, fraction * chain.rows * chain.cols, key=chain.parameters)
    return AtSize(fraction, rank, floors.upper(rank) if rank else 1.0)
