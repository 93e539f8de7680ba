"""README and docstrings say what the scripts do: commands run, flags exist, the analysis snippet works."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import ks

README = (ROOT / "README.md").read_text()
SCRIPTS = [
    "train_with_random",
    "rank_sweep_study",
    "generate_test_weight",
    "plot_rank_results",
    "example_rank_sweep",
]
# The README's commands as they stand, made small by flags appended to them.
SMALL = {
    "generate_test_weight.py": "--output_features 32 --input_features 48",
    "rank_sweep_study.py": "--num_epochs 2 --num_samples 200 --ranks 2 8",
    "plot_rank_results.py": "",
    "example_rank_sweep.py": "--num_epochs 1 --num_samples 200 --ranks 2",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def flags_of(script):
    parser = importlib.import_module(script).build_parser()
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


def test_the_workflow_by_hand_runs_as_written(tmp_path):
    lines = "\n".join(blocks("bash")).replace("\\\n", "").splitlines()
    commands = [line for line in lines if line.startswith("python ")]
    assert len(commands) == 6
    for command in commands:
        _, script, *arguments = shlex.split(command)
        small = [sys.executable, str(ROOT / script), *arguments, *SMALL[script].split()]
        done = subprocess.run(small, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank_sweep_results" / "my_study_loss_curves.png").exists()
    assert (tmp_path / "figures" / "rank_sweep_chains.png").exists()


def test_the_analysis_snippet_runs_as_written(run, weight_path, tmp_path):
    snippet = next(block for block in blocks("python") if "read_csv" in block)
    sweep = ("--weight_path", weight_path, "--ranks", 2, 4, "--num_epochs", 1, "--num_samples", 80)
    assert run("rank_sweep_study.py", *sweep).returncode == 0
    (tmp_path / "snippet.py").write_text(snippet)
    done = run(tmp_path / "snippet.py", env={"MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr
    assert "Optimal rank: " in done.stdout


def test_the_layer_example_runs_as_written(tmp_path):
    snippet = next(block for block in blocks("python") if "from_linear" in block)
    smaller = snippet.replace("4096", "48").replace("2048", "32").replace("rank=16", "rank=2").replace("[16]", "[2]")
    ks.KSLinear(8, 8).save(tmp_path / "rank_16_final.pth")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{smaller}assert floor.exact and len(small.factors) == 2"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_flag_is_in_the_readme_and_every_flag_there_exists():
    known = set().union(*map(flags_of, SCRIPTS)) - {"--help"}
    written = set(re.findall(r"`(--[a-z_0-9]+)", README)) - {"--help", "--no-deps"}
    assert written == known


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_show_two_commands_with_flags_that_exist(script):
    doc = importlib.import_module(script).__doc__
    commands = [line for line in doc.splitlines() if line.startswith("    python ")]
    assert len(commands) == 2
    known = flags_of(script) | (flags_of("rank_sweep_study") if script == "example_rank_sweep" else set())
    assert (
        set(re.findall(r"(?<=\s)--[a-z_0-9]+", "\n".join(re.findall(r"    python .*(?:\n        .*)*", doc)))) <= known
    )


def test_shared_flags_have_one_default_except_those_of_the_brief():
    defaults = {}
    for script in SCRIPTS:
        for action in importlib.import_module(script).build_parser()._actions:
            defaults.setdefault(action.dest, {})[script] = action.default
    differing = {name for name, values in defaults.items() if len({str(value) for value in values.values()}) > 1}
    # --save_interval: the brief's rank folders hold no epoch checkpoints; --rank of the generator is another thing.
    assert differing == {"num_epochs", "output_dir", "save_prefix", "save_interval", "rank"}
