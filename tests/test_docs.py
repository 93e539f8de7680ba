"""README, docs and docstrings are right: commands and snippets run, flags exist, tables and links are up to date."""

import dataclasses
import importlib
import re
import shlex
import shutil

import pytest
import safetensors.torch
import torch
from conftest import QUICK, ROOT, read_table

import ks
from ks.moments.moments_file import InputMoments
from ks.moments.second_moment import VectorSums

SCRIPTS = [
    "train_with_random",
    "rank_sweep_study",
    "generate_test_weight",
    "plot_rank_results",
    "example_rank_sweep",
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
# The commands as they stand, made small by flags appended to them.
SMALL = {
    "generate_test_weight.py": "--output_features 32 --input_features 48",
    "rank_sweep_study.py": "--num_epochs 2 --num_samples 200 --ranks 2 8",
    "plot_rank_results.py": "",
    "example_rank_sweep.py": "--num_epochs 1 --num_samples 200 --ranks 2",
}
# Pages with commands: how many of them, and a file that they leave.
COMMANDS = {
    "README.md": (6, "rank_sweep_results/my_study_loss_curves.png"),
    "docs/flags.md": (3, "figures/rank_sweep_chains.png"),
    "docs/results.md": (4, "butterfly_results/rank_sweep_summary.csv"),
    "docs/models.md": (1, "model_plan/rank_sweep_plan.csv"),
    "docs/inputs.md": (1, "rank_sweep_results/rank_sweep_floor.png"),
}
# Flags of argparse, of pip, ray, tensorboard, lm_eval and docker, and of the programs in benchmarks/.
FOREIGN = {
    *("--help", "--help_all"),
    *("--no-deps", "--head", "--port", "--address", "--disable-usage-stats", "--logdir"),
    *("--tasks", "--model", "--model_args", "--cpus"),
    *("--compiled", "--earlier", "--rounds", "--csv", "--dtypes", "--without_first", "--generate"),
    *("--train", "--shares"),
}


def blocks(page, language):
    """The fenced blocks of a page in a language, '' for output."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [content for name, content in fenced if name == language]


def commands(page):
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    return [line for line in lines if line.startswith("python ")]


def fields_of(script):
    return dataclasses.fields(importlib.import_module(script).build_parser().config)


def flags_of(script):
    """Every spelling of the flags of a script."""
    return {
        spelling for field in fields_of(script) for spelling in (f"--{field.name}", *field.metadata["flag"].aliases)
    }


KNOWN_FLAGS = set().union(*map(flags_of, SCRIPTS))


@pytest.fixture
def run_code(run, tmp_path):
    """Run lines of Python that can import ks, in tmp_path; return what they print."""

    def run_lines(*lines):
        (tmp_path / "snippet.py").write_text("\n".join([f"import sys; sys.path.insert(0, {str(ROOT)!r})", *lines]))
        done = run(tmp_path / "snippet.py", env={"MPLBACKEND": "agg"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_lines


def slug(heading):
    """The anchor that a Markdown renderer gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(page):
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in target]


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_of_a_page_run_as_written(page, run, tmp_path):
    number, left = COMMANDS[page]
    assert len(commands(page)) == number
    if not any("generate_test_weight.py" in command for command in commands(page)):
        torch.save(torch.randn(32, 48), tmp_path / "my_weight.pth")
    model = tmp_path / "model.safetensors"
    shapes = {
        "encoder.layer.0.output.dense": (24, 48),
        "encoder.layer.0.intermediate.dense": (48, 24),
        "encoder.layer.3.attention.output.dense": (16, 24),
    }
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    safetensors.torch.save_file(weights, model)
    (tmp_path / "build").mkdir()
    train = {name: VectorSums.of(torch.randn(500, width)) for name, (_, width) in shapes.items()}
    moments = InputMoments(train, {}, {f"{name}.weight": name for name in train}, dict.fromkeys(train, 1))
    moments.save(tmp_path / "build" / "minilm_inputs.safetensors")
    for command in commands(page):
        _, script, *arguments = shlex.split(command.replace("$MODEL", str(model)))
        done = run(script, *arguments, *SMALL[script].split())
        assert done.returncode == 0, done.stderr
    assert (tmp_path / left).exists()


def test_no_other_page_has_commands():
    assert {page for page in PAGES if commands(page)} == set(COMMANDS)


def test_the_analysis_snippet_runs_as_written(run, run_code, weight_path):
    snippet, _ = [block for block in blocks("docs/files.md", "python") if "read_csv" in block]
    assert run("rank_sweep_study.py", "--weight_path", weight_path, "--ranks", 2, 4, *QUICK).returncode == 0
    assert "Optimal rank: " in run_code(snippet)


def test_the_documented_rule_picks_the_rank_of_the_answer(run, run_code, weight_path):
    _, snippet = [block for block in blocks("docs/files.md", "python") if "read_csv" in block]
    sweep = ("--weight_path", weight_path, "--ranks", 3, 4, 9, "--num_epochs", 20, "--num_samples", 800)
    done = run("rank_sweep_study.py", *sweep, "--target_relative_loss", 0.1)
    assert done.stdout.startswith("Rank 3 is the smallest trained rank that loses at most 10%"), done.stdout
    assert run_code(snippet).splitlines()[1].split()[1] == "3"


@pytest.mark.parametrize("edit", ["criterion", "metrics"])
def test_the_edits_of_the_readme_run_as_written(edited_toolkit, run, weight_path, tmp_path, edit):
    snippet = next(block for block in blocks("README.md", "python") if block.startswith(f"def {edit}"))
    edited_toolkit(**{edit: snippet if edit == "criterion" else snippet.split("\n", 1)[1]})
    flags = ("--metric", "cosine") if edit == "metrics" else ()
    done = run(tmp_path / "rank_sweep_study.py", "--weight_path", weight_path, "--ranks", 2, *QUICK, *flags)
    assert done.returncode == 0, done.stderr
    (row,) = read_table(tmp_path / "rank_sweep_results" / "rank_sweep_summary.csv")
    if edit == "criterion":
        assert row["loss_floor"] == ""
        assert "criterion user-defined sha256" in done.stderr
    else:
        assert row["final_cosine"] == row["best_cosine"] != ""
        assert (tmp_path / "rank_sweep_results" / "rank_sweep_metric_cosine.png").exists()


def test_the_layer_example_runs_as_written(run_code, tmp_path):
    snippet = next(block for block in blocks("README.md", "python") if "from_linear" in block)
    ks.KSLinear(48, 32).save(tmp_path / "rank_16_final.pth")
    run_code(
        snippet.replace("4096", "48").replace("2048", "32").replace("rank=16", "rank=2").replace("[16]", "[2]"),
        "assert floor.exact and len(small.factors) == 2",
        "x = torch.randn(3, 48)",
        "assert model(x).shape == (3, 32)",
        "assert torch.equal(chain(x), ks.load('rank_16_final.pth')(x) + linear.bias)",
    )


def test_the_example_of_a_whole_model_runs_as_written(run_code):
    run_code(
        next(block for block in blocks("README.md", "python") if "ks.compress(" in block),
        "assert plan.share <= 0.5 and isinstance(small[0], ks.KSLinear)",
        "x = batches[0][0]",
        "assert torch.equal(ks.load_compressed(model, 'small_model')(x), small(x))",
    )


def test_the_examples_of_measured_inputs_run_as_written(run_code):
    setup = (
        "import torch",
        "class Model(torch.nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        "        self.embed = torch.nn.Embedding(8, 8)",
        "        self.encoder = torch.nn.ModuleDict({'dense': torch.nn.Linear(8, 8)})",
        "    def forward(self, input_ids, attention_mask):",
        "        return self.encoder['dense'](self.embed(input_ids))",
        "model, small = Model(), Model()",
        "batch = {'input_ids': torch.randint(8, (30, 8)), 'attention_mask': torch.ones(30, 8, dtype=torch.int64)}",
        "loader = [batch] * 10",
    )
    layers = ("layer.*.output.dense", "dense"), ("layer.0.output.dense", "dense"), ("**.mlp.*", "encoder.dense")
    snippets = blocks("docs/inputs.md", "python")
    assert len(snippets) == 5
    for long, short in (*layers, ("1536", "8")):
        snippets = [block.replace(long, short) for block in snippets]
    run_code(*setup, *snippets, "assert given.train.count == 8 * 240 * 3, given.train.count")


def test_the_examples_of_whole_models_run_as_written(run_code, tmp_path):
    setup = (
        "from collections import OrderedDict",
        "import torch",
        "def network():",
        "    torch.manual_seed(0)",
        "    mlp = {'up': torch.nn.Linear(8, 24), 'act': torch.nn.ReLU(), 'down': torch.nn.Linear(24, 11)}",
        "    parts = {'table': torch.nn.Embedding(11, 8), 'mlp': torch.nn.Sequential(OrderedDict(mlp))}",
        "    return torch.nn.Sequential(OrderedDict(parts))",
        "model, fresh_model, batches = network(), network(), [torch.randint(11, (4, 25)) for _ in range(5)]",
        "unseen_batches = batches[:1]",
    )
    checks = (
        "x = torch.randint(11, (2, 3))",
        "assert isinstance(model.mlp.up, ks.KSLinear)",
        "assert ks.model.model_plan.ModelPlan.load('plan.json').measured_uniform == beside",
        "other = network()",
        "ks.compress_in_order(other, plan, batches, max_passes=6)",
        "assert other(x).shape == (2, 3, 11)",
    )
    # tests/model/test_scoring.py runs the others
    snippets = [block for block in blocks("docs/models.md", "python") if not re.search(r"HFLM|torch\.export", block)]
    run_code(*setup, *snippets, *checks)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"small_model", "ordinary_checkpoint"}


def test_every_flag_is_documented():
    rows = [line for line in PAGES["docs/flags.md"].splitlines() if line.startswith("| `--")]
    documented = {flag for row in rows for flag in re.findall(r"`(--\w+)`", row.split(" | ")[0])}
    assert documented == KNOWN_FLAGS


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_names_exists(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9-]*", PAGES[page]))
    assert named - FOREIGN <= KNOWN_FLAGS


def test_the_generated_tables_are_up_to_date_and_one_that_is_not_is_written_again(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "docs")
    generate = importlib.import_module("generate")
    assert generate.main(["--check"]) == 0, capsys.readouterr().err
    monkeypatch.setattr(generate, "DOCS", shutil.copytree(ROOT / "docs", tmp_path / "docs"))
    page = tmp_path / "docs" / "files.md"
    page.write_text(page.read_text().replace("| `val_loss` |", "| `validation_loss` |"))
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("docs/files.md is out of date")
    assert "validation_loss" in page.read_text()
    assert generate.main([]) == 0
    assert page.read_text() == PAGES["docs/files.md"]


def test_the_readme_is_a_front_page():
    assert len(PAGES["README.md"].splitlines()) <= 199
    widths = [len(line) for block in blocks("README.md", "") for line in block.splitlines()]
    assert max(widths) <= 100
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= {*links("README.md")}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_picture_is_shown_and_small():
    shown = {((ROOT / page).parent / link).resolve() for page in PAGES for link in links(page)}
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture in shown
        assert picture.stat().st_size < 100_000


def test_every_target_of_make_that_a_page_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for text in PAGES.values() for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)}
    assert named <= targets


def test_the_design_page_names_every_file_of_the_package():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "ks").rglob("*.py") if path.stem != "__init__"}
    assert set(re.findall(r"^\| `(ks/[\w/]+\.py)` \|", PAGES["docs/design.md"], re.MULTILINE)) == files


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_show_two_commands_with_flags_that_exist(script):
    doc = importlib.import_module(script).__doc__
    assert len([line for line in doc.splitlines() if line.startswith("    python ")]) == 2
    shown = re.findall(r"    python .*(?:\n        .*)*", doc)
    known = flags_of(script) | (flags_of("rank_sweep_study") if script == "example_rank_sweep" else set())
    assert set(re.findall(r"(?<=\s)--[a-z_0-9]+", "\n".join(shown))) <= known


def test_shared_flags_have_one_default_but_for_known_exceptions():
    defaults = {}
    for script in SCRIPTS:
        for field in fields_of(script):
            defaults.setdefault(field.name, {})[script] = field.default
    differing = {name for name, values in defaults.items() if len({str(value) for value in values.values()}) > 1}
    # --save_interval: the folder of a rank holds no epoch checkpoints; --rank of the generator is another thing.
    assert differing == {"num_epochs", "output_dir", "save_prefix", "save_interval", "rank"}
