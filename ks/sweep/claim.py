"""Claiming a results folder: it belongs to one study, whose settings are recorded in it."""

from ks.errors import UsageError
from ks.files.atomic import prepare_output_dir, read_json_object, write_json
from ks.files.layout import SweepFiles, find_runs
from ks.sweep.run import Run
from ks.training.checkpoints import changes


def claim_folder(files: SweepFiles, runs: list[Run], record: dict, overwrite: bool) -> None:
    """Claim a results folder for a study: record its settings, make the run folders, delete old summary and figures.

    Args:
        files: of the sweep; the folder exists.
        runs: of the study.
        record: content of the config file; `record["settings"]` identifies the study.
        overwrite: clear away the results in the folder, also those of another study.
    Raises:
        UsageError: the folder holds another study; every setting that differs is named.
    """
    _refuse_another_study(files, record["settings"], overwrite)
    if overwrite:
        for _, _, present in find_runs(files.directory):
            present.remove()
            present.log.unlink(missing_ok=True)
    files.remove_outputs()
    write_json(files.config, record)  # before the run folders: a claim that fails half-way can be repeated
    for run in runs:
        prepare_output_dir(run.files.directory)


def _refuse_another_study(files: SweepFiles, settings: dict, overwrite: bool) -> None:
    if overwrite or not (find_runs(files.directory) or files.config.exists() or files.summary_csv.exists()):
        return
    before = read_json_object(files.config).get("settings")
    if not isinstance(before, dict):
        difference = f"results of something else (no readable {files.config.name})"
    elif changed := changes(before, settings):
        difference = f"another study ({changed})"
    else:
        return
    raise UsageError(f"{files.directory} holds {difference}; choose another --output_dir or give --overwrite")
