"""The shape of the house: imports go one way, heavy libraries have their place, start-up stays light."""

import ast
import graphlib
import subprocess
import sys

from conftest import ROOT

FILES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "ks").glob("*.py") if path.stem != "__init__"}
SCRIPTS = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}


def imported(tree) -> set[str]:
    """Full names of what a file imports: ks.patterns, torch, …"""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "ks" else set()
    return names


def test_imports_inside_the_package_have_no_cycle():
    graph = {name: {other for other in FILES if f"ks.{other}" in imported(tree)} for name, tree in FILES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_package_imports_no_script_and_no_script_another():
    for name, tree in {**FILES, **SCRIPTS}.items():
        assert not {module.split(".")[0] for module in imported(tree)} & (set(SCRIPTS) - {name})


def test_heavy_libraries_are_imported_only_where_they_belong():
    """pandas is for tables that people see or plot; what trains must not wait for it."""
    tables = {"report", "study", "plots"}
    importers_of = {"matplotlib": {"plots"}, "triton": {"kernels"}, "tqdm": {"progress"}, "pandas": tables}
    importers_of |= {"ray": {"launch_ray"}}
    for library, allowed in importers_of.items():
        importers = {
            name
            for name, tree in {**FILES, **SCRIPTS}.items()
            if library in {module.split(".")[0] for module in imported(tree)}
        }
        assert importers <= allowed


def test_patterns_need_no_torch():
    assert "torch" not in imported(FILES["patterns"])


def test_importing_what_the_trainer_needs_is_light():
    code = "import sys, train_with_random; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for heavy in ("triton", "matplotlib", "pandas", "torch._dynamo"):
        assert f"'{heavy}'" not in loaded
