"""Claiming a results folder: it belongs to one study, whose settings and files are recorded in it."""

from pathlib import Path

from ks.errors import UsageError
from ks.files.atomic import prepare_output_dir, read_json_object, write_json
from ks.files.layout import RunFiles, SweepFiles, find_runs
from ks.files.ownership import check_free, check_no_link, delete, recorded
from ks.study.run import Run
from ks.training.checkpoints import changes, settings_in

REMEDY = "choose another --output_dir"


def claim_folder(
    files: SweepFiles, runs: list[Run], record: dict, inputs: list[Path], overwrite: bool, remedies: str = ""
) -> None:
    """Claim a results folder for a study: record its settings and files, delete old outputs.

    Args:
        files: of the sweep; the folder exists.
        runs: of the study.
        record: content of the config file; `record["settings"]` identifies the study, `record["files"]` is added.
        inputs: files that the study reads.
        overwrite: delete the results in the folder, also those of another study, as far as they are ours.
        remedies: the commands that would work, for the message.
    Raises:
        UsageError: the folder holds another study, or a file of the user's is in the way.
    """
    folder, all_files = files.directory, files.all({run.seed for run in runs})
    others = [path for path in sorted(folder.glob("*_config.json")) if _is_sweep(path) and path != files.config]
    if not overwrite:
        _refuse_another_study(files, others, record["settings"], remedies or f"{REMEDY} or give --overwrite")
    present = [run for _, _, run in find_runs(folder)]
    owned = recorded(files.config, [*files.all(), *(path for run in present for path in run.all())])
    for run in runs:
        for inside in (run.files.directory, run.files.directory.parent):
            if inside != folder:
                check_no_link(inside)
        check_free(run.files.all(), owned | owned_by_run(run.files), inputs, REMEDY)
    check_free(all_files, owned | _plotted(files), inputs, REMEDY)
    if overwrite:
        for path in others:
            delete(recorded(path), inputs)
        for found in present:
            if not found.directory.is_symlink() and not found.directory.parent.is_symlink():
                delete(owned_by_run(found) | owned & {*found.all()}, inputs)
    else:
        for run in runs:
            if not owned_by_run(run.files):  # a damaged record: the run starts anew
                delete(owned & {*run.files.all()}, inputs)
    delete(owned & {*files.outputs(), *files.metric_figures(), *files.samples_left()}, inputs)
    ours = sorted(
        {*all_files, *(path for path in owned if path.exists()), *(p for run in runs for p in run.files.all())}
    )
    record["files"] = [path.relative_to(folder).as_posix() for path in ours]
    write_json(files.config, record)
    for run in runs:
        if run.files.directory.exists():
            prepare_output_dir(run.files.directory)


def _plotted(files: SweepFiles) -> set[Path]:
    """Return the figures that plot_rank_results.py has drawn in the folder from the results in it."""
    sources = read_json_object(files.figures_record).get("sources")
    return recorded(files.figures_record) if sources == [str(files.directory)] else set()


def owned_by_run(files: RunFiles) -> set[Path]:
    """Return the files that the record of a run names, and its log, which the sweep writes."""
    owned = recorded(files.config, [*files.all(), *files.epoch_checkpoints()])
    return owned | {files.log} if owned else owned


def _is_sweep(path: Path) -> bool:
    return not path.is_symlink() and {"settings", "ranks"} <= read_json_object(path).keys()


def _refuse_another_study(files: SweepFiles, others: list[Path], settings: dict, remedies: str) -> None:
    config = read_json_object(files.config)
    before = config.get("settings")
    if others:
        difference = f"the study of --save_prefix {others[0].name.removesuffix('_config.json')}"
    elif isinstance(before, dict):
        changed = changes(settings_in(before, config.get("loss")), settings)
        difference = f"another study ({changed})" if changed else ""
    elif find_runs(files.directory) or files.config.exists() or files.summary_csv.exists():
        difference = f"results of something else (no readable {files.config.name})"
    else:
        difference = ""
    if difference:
        raise UsageError(f"{files.directory} holds {difference}; {remedies}")
