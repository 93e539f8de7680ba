"""The results folder of a study: held by one sweep at a time, and claimed for one study, which is recorded in it."""

import contextlib
from pathlib import Path

from ks.errors import UsageError
from ks.files.atomic import prepare_output_dir, read_json_object, write_json
from ks.files.layout import RunFiles, SweepFiles, find_runs
from ks.files.lock import locked
from ks.files.ownership import check_free, check_no_link, delete, recorded
from ks.study.runs import Run
from ks.training.run_state import changes, settings_in

REMEDY = "choose another --output_dir"


def held(files: SweepFiles) -> contextlib.AbstractContextManager[None]:
    """Return a context in which no other sweep works in the results folder, which is made if needed.

    Raises:
        UsageError: it cannot be written, or another sweep works in it.
    """
    prepare_output_dir(files.directory)
    return locked(files.lock, "another sweep")


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
    if not overwrite:
        refuse_another_study(files, record["settings"], remedies)
    present = [run for _, _, run in find_runs(folder)]
    owned = recorded(files.config, [*files.all(), *(path for run in present for path in run.all())])
    for run in runs:
        for inside in (run.files.directory, run.files.directory.parent):
            if inside != folder:
                check_no_link(inside)
        check_free(run.files.all(), owned | owned_by_run(run.files), inputs, REMEDY)
    check_free(all_files, owned | _plotted(files), inputs, REMEDY)
    if overwrite:
        for path in _other_studies(files):
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


def _other_studies(files: SweepFiles) -> list[Path]:
    """Return the records of studies with another --save_prefix."""
    found = [path for path in sorted(files.directory.glob("*_config.json")) if path != files.config]
    return [path for path in found if not path.is_symlink() and {"settings", "ranks"} <= read_json_object(path).keys()]


def refuse_another_study(files: SweepFiles, settings: dict, remedies: str = "") -> None:
    """Raise UsageError if a results folder holds another study than one with these settings.

    Args:
        files: of the sweep; the folder need not exist.
        settings: that identify the study.
        remedies: the commands that would work, for the message.
    """
    config = read_json_object(files.config)
    before, others = config.get("settings"), _other_studies(files)
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
        raise UsageError(f"{files.directory} holds {difference}; {remedies or f'{REMEDY} or give --overwrite'}")
