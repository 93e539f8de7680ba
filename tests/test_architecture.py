"""The layout of the package: imports go one way, heavy libraries have their place, scripts start fast."""

import ast
import graphlib
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

PACKAGE = ROOT / "ks"
# Every module but the empty ones that make folders packages, by its path below ks: layer, chain.passes, …
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
}
SCRIPTS = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
# The rooms in the order of their imports: a module imports from its own room and from those before it.
ROOMS = (
    *("errors", "signals", "chain", "files", "moments", "bounds", "layer", "model"),
    *("cli", "training", "report", "study"),
)


def imported(tree) -> set[str]:
    """Full names of what a file imports: ks.chain.patterns, ks.chain.passes.ChainPasses, torch, …"""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


GRAPH = {name: {other for other in FILES if f"ks.{other}" in imported(tree)} for name, tree in FILES.items()}


def room_of(name: str) -> str:
    return name.split(".")[0]


def test_imports_go_one_way_between_the_rooms_and_in_no_circle_inside_one():
    assert {room_of(name) for name in FILES} == set(ROOMS)
    backwards = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    ]
    assert backwards == []
    list(graphlib.TopologicalSorter(GRAPH).static_order())


def test_the_report_takes_bounds_as_data_and_computes_none():
    found = {name for module, tree in FILES.items() if room_of(module) == "report" for name in imported(tree)}
    bounds = {name for name in found if name.startswith("ks.bounds.")}
    assert {name.split(".")[-1] for name in bounds if name[len("ks.") :] not in FILES} <= {"Floor", "TargetRanks"}


def test_rooms_have_no_code_of_their_own():
    """An import of a room imports none of its modules, so that importing one module stays light."""
    for room in PACKAGE.rglob("*/__init__.py"):
        assert ast.parse(room.read_text()).body == []


def test_the_package_imports_no_script_and_no_script_another():
    for name, tree in {**FILES, **SCRIPTS}.items():
        assert not {module.split(".")[0] for module in imported(tree)} & (set(SCRIPTS) - {name})


HOMES = {
    "matplotlib": {name for name in FILES if name.startswith("report.figures.")},
    "triton": {"chain.triton_kernels", "chain.backend"},
    "tqdm": {"study.run_all"},
    "ray": {"study.ray_cluster"},
    "submitit": {"study.slurm_cluster"},
    "wandb": {"training.trackers"},
    "trackio": {"training.trackers"},
    "pandas": {*(name for name in FILES if room_of(name) == "report"), "study.outputs"},  # for tables that people see
}


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_are_imported_only_where_they_belong(library):
    importers = {
        name
        for name, tree in {**FILES, **SCRIPTS}.items()
        if library in {module.split(".")[0] for module in imported(tree)}
    }
    assert importers
    assert importers <= HOMES[library]


@pytest.mark.parametrize("name", ["errors", "signals", "cli.console"])
def test_signals_are_handled_before_torch_loads(name):
    assert "torch" not in imported(FILES[name])


def test_the_trainer_starts_without_heavy_and_optional_libraries():
    code = "import sys, ks.study.ray_cluster, train_with_random; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "ks.training.recorder" in loaded
    assert not loaded & {"triton", "matplotlib", "pandas", "torch._dynamo", "ray", "tensorboard", "wandb", "trackio"}
    assert "ks.study.run_all" not in loaded  # torch itself loads tqdm where it is installed


def test_every_room_is_installed():
    """By the rule of pyproject.toml, tried on the folders that hold an __init__.py."""
    rule = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    folders = {"ks", *(f"ks.{name.rpartition('.')[0]}" for name in FILES if "." in name)}
    assert {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")} == folders
    setuptools = pytest.importorskip("setuptools")
    assert set(setuptools.find_packages(str(ROOT), **rule)) == folders
