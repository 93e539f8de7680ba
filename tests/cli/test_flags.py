"""Every flag is a field of a configuration, and every field a flag."""

import dataclasses
import importlib
import re

import pytest

from ks.cli import flags
from ks.cli.flags import SweepConfig, TrainerConfig, TrainingFlags
from ks.cli.parser import Parser, to_arguments

CONFIGS = {
    "train_with_random": flags.TrainerConfig,
    "rank_sweep_study": flags.SweepConfig,
    "plot_rank_results": flags.PlotConfig,
    "generate_test_weight": flags.GeneratorConfig,
    "example_rank_sweep": flags.DemoConfig,
}
REQUIRED = {"weight_path": ["--weight_path", "w.pth"], "results_dir": ["--results_dir", "a", "b"]}


def unusual(field):
    """Return a value of a flag that is not its default."""
    described, default = field.metadata["flag"], field.default
    if described.choices:
        return next(choice for choice in reversed(described.choices) if choice != default)
    if described.nargs:
        return 4, 6
    if default is False:
        return True
    if isinstance(default, int | float):
        return default + 1 if isinstance(default, int) else default / 3
    return "a folder/x 1"


SHARED = dataclasses.fields(TrainingFlags)
UNUSUAL = {field.name: unusual(field) for field in SHARED}  # of the flags that the sweep passes on to its runs


def required_of(config):
    return [word for field in dataclasses.fields(config) for word in REQUIRED.get(field.name, [])]


BRIEF = (
    *("--weight_path", "--ranks", "--max_rank", "--num_epochs", "--batch_size", "--lr", "--num_samples"),
    *("--output_dir", "--save_prefix", "--log_scale"),
)


@pytest.mark.parametrize("script", CONFIGS)
def test_help_fits_on_a_screen_and_help_all_has_every_flag(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    parser, config = importlib.import_module(script).build_parser(), CONFIGS[script]
    assert type(parser.parse(required_of(config))) is config
    assert all(f"--{field.name}" in parser.format_help_all() for field in dataclasses.fields(config))
    shown = parser.format_help()
    assert len(shown.splitlines()) <= 50
    assert f"python {script}.py" in shown
    listed = re.findall(r"^  (--\w+)", shown, re.MULTILINE)
    if script == "rank_sweep_study":
        assert tuple(listed[: len(BRIEF)]) == BRIEF
    if hasattr(config, "MAIN"):
        assert listed == [*(f"--{name}" for name in config.MAIN), "--help_all"]
        with pytest.raises(SystemExit) as raised:
            parser.parse(["--help_all"])
        assert (raised.value.code, capsys.readouterr().out) == (0, parser.format_help_all())


RETIRED = {
    SweepConfig: ("stop_ranks", "runs_per_gpu", "resume_interval", "figsize"),
    TrainerConfig: ("resume_interval",),
    flags.PlotConfig: ("figsize",),
}


@pytest.mark.parametrize(("config", "name"), [(config, name) for config, names in RETIRED.items() for name in names])
def test_a_retired_flag_is_one_line_with_what_to_do_instead(capsys, config, name):
    with pytest.raises(SystemExit) as raised:
        Parser(config, "").parse([*required_of(config), f"--{name}", "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert raised.value.code == 2
    assert f"error: --{name} no longer exists: " in line


@pytest.mark.parametrize("changed", [{}, UNUSUAL], ids=["defaults", "unusual"])
def test_the_settings_of_a_sweep_parse_back_to_the_same_trainer_configuration(changed):
    sweep = SweepConfig(**{"weight_path": "w.pth"} | changed)
    parsed = Parser(TrainerConfig, "").parse(to_arguments(sweep.training_settings()))
    assert parsed == TrainerConfig(**sweep.training_settings())
    assert parsed.training_settings() == sweep.training_settings()


def test_what_is_off_or_not_given_is_left_out():
    settings = {"a": None, "b": False, "c": True, "d": 0, "e": (1, 2), "f": ""}
    assert to_arguments(settings) == ["--c", "--d", "0", "--e", "1", "2", "--f", ""]


def test_the_documented_defaults():
    trainer, sweep = TrainerConfig(weight_path="w.pth"), SweepConfig(weight_path="w.pth")
    assert (trainer.num_epochs, trainer.rank, trainer.save_interval) == (100, 4, 10)
    assert (trainer.output_dir, trainer.save_prefix) == ("./trained_models", "ks_chain")
    assert (sweep.num_epochs, sweep.save_interval) == (50, 0)
    assert (sweep.output_dir, sweep.save_prefix) == ("./rank_sweep_results", "rank_sweep")
    generator = flags.GeneratorConfig()
    assert (generator.output_features, generator.input_features) == (2048, 4096)
    assert generator.output_path == "./test_weight.pth"


def test_old_names_of_flags_are_taken():
    parser = Parser(SweepConfig, "")
    new = parser.parse(["--weight_path", "w.pth", "--title", "T"])
    assert parser.parse(["--weight_path", "w.pth", "--plot_title", "T"]) == new
    assert parser.parse(["--weight_path", "w.pth", "--save_plots"]).save_plots
    assert Parser(flags.PlotConfig, "").parse(["--results_dir", "a", "--plot_title", "T"]).title == "T"


LISTS = {
    "ranks": "2 4 8",
    "seeds": "0 1",
    "row_splits": "256 4",
    "col_splits": "4 512",
    "formats": "png svg",
    "chains": "monarch lowrank",
    "metric": "r2 top-5",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_take_commas(name):
    parser, words = Parser(SweepConfig, ""), LISTS[name].split()
    expected = parser.parse(["--weight_path", "a,b.pth", f"--{name}", *words])
    assert expected.weight_path == "a,b.pth"
    joined = ",".join(words)
    for given in ([joined], [f"{joined},"], [", ".join(words)], [f"{words[0]},", *words[1:]]):
        assert parser.parse([f"--{name}", *given, "--weight_path", "a,b.pth"]) == expected
    assert parser.parse([f"--{name}={joined}", "--weight_path", "a,b.pth"]) == expected


def test_every_list_but_those_of_paths_and_names_takes_commas():
    lists = {field.name for field in dataclasses.fields(SweepConfig) if field.metadata["flag"].nargs == "+"}
    assert lists == {*LISTS, "weight_key", "slurm"}
    assert Parser(SweepConfig, "").parse(["--weight_path", "w", "--launcher", "slurm", "--slurm", "a=b,c"]).slurm == (
        "a=b,c",
    )
    assert Parser(flags.PlotConfig, "").parse(["--results_dir", "a,b", "c"]).results_dir == ("a,b", "c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_epoch", "3"], "unknown flag --num_epoch: did you mean --num_epochs?"),
        (["-rank", "3"], "unknown flag -rank: did you mean --rank?"),
        (["--batchsize", "3", "--nothing"], "unknown flag --batchsize: did you mean --batch_size?; unknown flag --n"),
        (["--weight_path", "w.pth", "--rank", "0"], "'0' is not a whole number from 1 to 2147483647"),
        (["--weight_path", "w.pth", "--lr", "inf"], "'inf' is not a number from 1e-100 to 1e+100"),
        (["--weight_path", "w.pth", "--val_split", "1"], "'1' is not a number between 0 and 1"),
        (["--weight_path", "w.pth", "--save_prefix", ".hidden"], "is not a file name prefix"),
        (["--weight_path", "w.pth", "--scheduler", "linear"], "invalid choice"),
    ],
    ids=str,
)
def test_a_bad_command_line_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        Parser(TrainerConfig, "").parse(arguments)
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.endswith(" (--help lists the flags)")


def test_a_value_may_look_like_a_flag_if_it_has_a_space():
    assert Parser(SweepConfig, "").parse(["--weight_path", "w.pth", "--title", "--my title"]).title == "--my title"


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert Parser(SweepConfig, "").parse(["--weight_path=~/w.pth"]).weight_path == "/home/someone/w.pth"
