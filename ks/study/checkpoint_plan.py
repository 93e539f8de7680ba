"""Plan a checkpoint as the flags ask: floors of its layers, a chain and a rank for each, and the files of both."""

import dataclasses

from ks import signals
from ks.chain.patterns import Chain
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import delete_leftovers, write_csv, write_json
from ks.files.layout import SweepFiles
from ks.files.ownership import check_free, recorded
from ks.files.provenance import provenance
from ks.model.allocate import allocate
from ks.model.candidates import Candidates, check_inputs, find_candidates
from ks.model.layer_weights import Selection, select_weights
from ks.model.model_plan import ModelPlan
from ks.moments.moments_file import as_moments
from ks.training.problem import chain_of, choose_device

DEFAULT_CHAINS = ("monarch", "lowrank")


def check_flags(config: SweepConfig) -> None:
    """Raise UsageError if flags do not go together in a study of several layers."""
    if config.row_splits is not None or config.col_splits is not None:
        raise UsageError("--row_splits and --col_splits are for one weight; name families by --chains")
    if config.chain is not None and config.chains is not None:
        raise UsageError(f"--chain {config.chain} together with --chains: give one or the other")
    if config.budget is not None and config.target_relative_loss is not None:
        raise UsageError("--budget together with --target_relative_loss: give one or the other")
    if config.budget is None and config.target_relative_loss is None:
        if config.rank_multiple != 1:
            raise UsageError("--rank_multiple is for a plan; give --budget or --target_relative_loss too")
        several = config.chains or ()
        if len(several) > 1 and not config.dry_run:
            raise UsageError(
                f"--chains {' '.join(several)}: give --budget or --target_relative_loss to choose one for each layer, "
                "or one --chain for all; --dry_run compares them"
            )
    if config.chain == "lowrank_butterfly":
        raise UsageError("--chain lowrank_butterfly has no floor, and a plan needs one; choose another family")
    for name in ("inputs_key", "fit_bias"):
        if getattr(config, name):
            raise UsageError(f"--{name} is for one weight; leave it out in a study of several layers")


def families_of(config: SweepConfig) -> tuple[str, ...]:
    """Return the families that compete for each layer."""
    return config.chains or (DEFAULT_CHAINS if config.chain is None else (config.chain,))


def select(config: SweepConfig) -> Selection:
    """Return the weights that --weight_key matches; without it, all 2-D weights of the file.

    Raises:
        UsageError: nothing matches, or a weight has no inputs in the file of --inputs.
    """
    selection = select_weights(config.weight_path, config.weight_key or "**", config.transpose)
    check_inputs(selection.weights, as_moments(config.inputs))
    return selection


def plan_checkpoint(
    config: SweepConfig, selection: Selection, files: SweepFiles
) -> tuple[list[Candidates], ModelPlan | None]:
    """Compute the floors of the layers and, with a budget or a target, choose a chain and a rank for each.

    Writes the floors, which the next plan reads, a table of them, and the plan.

    Args:
        config: of the sweep.
        selection: of the weights.
        files: of the sweep; the folder exists and is locked.
    Raises:
        UsageError: a file of the user's is in the way, a layer without inputs, or a budget that no plan meets.
    """
    delete_leftovers(files.planned())
    owned = recorded(files.plan_record)
    check_free(files.planned(), owned, config.files_read(), "choose another --output_dir or --save_prefix")
    names = [path.name for path in files.planned()]
    write_json(files.plan_record, {"files": names, "arguments": vars(config), "provenance": provenance()})
    for text in selection.notes:
        console.note(text, config.quiet)

    def make(rows: int, cols: int, family: str) -> Chain:
        return chain_of(dataclasses.replace(config, chain=family), rows, cols)

    candidates = find_candidates(
        selection.weights,
        make,
        families_of(config),
        config.inputs,
        files.floors,
        choose_device(config.device),
        lambda text: console.note(text, config.quiet),
        signals.check,
    )
    write_csv(files.layer_floors_csv, columns.names(columns.LAYER_FLOORS), _floor_rows(candidates))
    plan = None
    if config.budget is not None or config.target_relative_loss is not None:
        plan = allocate(
            candidates,
            budget=config.budget,
            target_relative_loss=config.target_relative_loss,
            rank_multiple=config.rank_multiple,
            checkpoint=selection.source,
        )
        plan.save(files.plan_json)
        write_csv(files.plan_csv, columns.names(columns.PLAN), plan.rows())
    return candidates, plan


def _floor_rows(candidates: list[Candidates]):
    for entry in candidates:
        for floors in entry.floors:
            for rank, parameters in zip(map(int, floors.ranks), floors.parameters.tolist()):
                yield {
                    "layer": entry.layer,
                    "rows": entry.rows,
                    "cols": entry.cols,
                    "chain": floors.chain.family,
                    "rank": rank,
                    "parameters": parameters,
                    "share": parameters / (entry.rows * entry.cols),
                    "relative_loss": float(floors.upper[rank]),
                    "relative_loss_lower": float(floors.lower[rank]),
                    "interpolated": floors.is_interpolated(rank),
                }
