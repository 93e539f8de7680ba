import json
import shlex

import rank_sweep_study
from ks.files.schema import StudyRecord
from ks.report.command import reproducing_command

ARGUMENTS = [
    *("--weight_path", "/a/b c/w.pth", "--weight_key=-odd", "--ranks", "2", "4", "--inputs", "/d/e.safetensors"),
    *("--output_dir", "/somewhere/results", "--lr", "0.01", "--log_scale", "--jobs", "2"),
]


def record_of(arguments, ranks, seeds=(0,)):
    """Return the record of a study and the arguments in it, as they are read back."""
    recorded = json.loads(json.dumps(vars(rank_sweep_study.build_parser().parse(arguments))))
    return StudyRecord({}, list(ranks), list(seeds), arguments=recorded), recorded


def test_the_command_parses_to_the_same_study_and_names_files_without_their_folders():
    record, recorded = record_of(ARGUMENTS, [2, 4])
    command = reproducing_command(record)
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "rank_sweep_study.py")
    again = json.loads(json.dumps(vars(rank_sweep_study.build_parser().parse(arguments))))
    names = {"weight_path": "w.pth", "inputs": "e.safetensors", "output_dir": "results"}
    assert again == recorded | names


def test_ranks_and_seeds_that_joined_later_are_in_the_command_and_other_defaults_are_left_out():
    record, _ = record_of(["--weight_path", "w.pth", "--max_rank", "8", "--overwrite"], [2, 4, 16], [0, 1])
    expected = "python rank_sweep_study.py --weight_path w.pth --ranks 2 4 16 --seeds 0 1"
    assert reproducing_command(record) == expected
