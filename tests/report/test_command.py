import json
import shlex

import rank_sweep_study
from ks.report.command import reproducing_command

ARGUMENTS = [
    *("--weight_path", "/a/b c/w.pth", "--weight_key=-odd", "--ranks", "2", "4", "--inputs", "/d/e.safetensors"),
    *("--output_dir", "/somewhere/results", "--lr", "0.01", "--log_scale", "--jobs", "2"),
]


def test_the_command_parses_to_the_same_study_and_names_files_without_their_folders():
    parser = rank_sweep_study.build_parser()
    recorded = json.loads(json.dumps(vars(parser.parse(ARGUMENTS))))
    command = reproducing_command(recorded)
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "rank_sweep_study.py")
    again = json.loads(json.dumps(vars(parser.parse(arguments))))
    names = {"weight_path": "w.pth", "inputs": "e.safetensors", "output_dir": "results"}
    assert again == recorded | names


def test_flags_at_their_defaults_are_left_out():
    recorded = vars(rank_sweep_study.build_parser().parse(["--weight_path", "w.pth"]))
    assert reproducing_command(recorded) == "python rank_sweep_study.py --weight_path w.pth"
