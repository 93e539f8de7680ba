"""Write the tables of the documentation that come from the code: flags in flags.md, columns in files.md.

    python docs/generate.py
    python docs/generate.py --check

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`. --check writes nothing; it lists the pages that
are out of date on stderr and exits with 1 if there are any.
"""

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from ks.cli.parser import Flag, groups  # noqa: E402
from ks.files import columns  # noqa: E402
from ks.files.table import markdown  # noqa: E402

SCRIPTS = (
    *("train_with_random", "rank_sweep_study"),
    *("generate_test_weight", "plot_rank_results", "example_rank_sweep"),
)
COLUMNS = {
    "curves": columns.CURVES,
    "summary": columns.SUMMARY,
    "runs": columns.RUNS,
    "all_curves": columns.ALL_CURVES,
    "floor": columns.FLOOR,
    "plan": columns.PLAN,
    "layer_floors": columns.LAYER_FLOORS,
}
MARKED = re.compile(r"<!-- generated: ([^>]*?) -->\n.*?<!-- end -->", re.DOTALL)


def flag_tables() -> dict[str, str]:
    """Return the table of every group of flags, by name, below a line with the scripts that have the group."""
    takers: dict[str, dict[str, list[dataclasses.Field]]] = {}
    for script in SCRIPTS:
        for title, fields in groups(importlib.import_module(script).build_parser().config):
            takers.setdefault(title, {})[f"{script}.py"] = fields
    return {f"flags, {title}": _flag_table(fields_of) for title, fields_of in takers.items()}


def _flag_table(fields_of: dict[str, list[dataclasses.Field]]) -> str:
    """Return the table of one group, from its fields by script; the scripts differ in defaults alone."""
    choices = any(field.metadata["flag"].choices for fields in fields_of.values() for field in fields)
    rows = []
    for same in zip(*fields_of.values(), strict=True):
        described: Flag = same[0].metadata["flag"]
        assert len({(field.name, field.metadata["flag"].help) for field in same}) == 1, same
        row = [_listed([f"--{same[0].name}", *described.aliases]), _default(dict(zip(fields_of, same, strict=True)))]
        rows.append([*row, *([_listed(described.choices or (), ", ")] if choices else []), described.help])
    takes = "takes" if len(fields_of) == 1 else "take"
    header = ("flag", "default", *(["choices"] if choices else []), "meaning")
    return f"{_listed(fields_of)} {takes} these flags:\n\n{markdown(header, rows)}"


def _listed(names: Iterable[str], last: str = " and ") -> str:
    """Return names as code, in one phrase."""
    *others, final = [f"`{name}`" for name in names] or [""]
    return last.join(filter(None, [", ".join(others), final]))


def _default(field_of: dict[str, dataclasses.Field]) -> str:
    """Return the default of a flag, and other defaults with the scripts that have them."""
    scripts_of: dict[str, list[str]] = {}
    for script, field in field_of.items():
        scripts_of.setdefault(field.metadata["flag"].default_text(field.default), []).append(script)
    first, *others = scripts_of
    return "; ".join([first, *(f"{text} in {_listed(scripts_of[text])}" for text in others)])


def column_tables() -> dict[str, str]:
    """Return the table of the columns of every file, by name; that of the curves has their keys in JSON too."""
    tables = {}
    for name, declared in COLUMNS.items():
        keys = any(column.plural for column in declared)
        rows = [
            [f"`{column.name}`", *([f"`{column.plural}`"] if keys else []), column.unit, column.description]
            for column in declared
        ]
        tables[f"columns, {name}"] = markdown(("column", *(["key in JSON"] if keys else []), "unit", "meaning"), rows)
    return tables


def filled(text: str, tables: dict[str, str]) -> str:
    """Return a page with every table between its markers."""
    return MARKED.sub(lambda found: f"<!-- generated: {found[1]} -->\n\n{tables[found[1]]}\n\n<!-- end -->", text)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    check = parser.parse_args(argv).check
    tables = flag_tables() | column_tables()
    pages = {path: path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))}
    placed = [name for text in pages.values() for name in MARKED.findall(text)]
    if sorted(placed) != sorted(tables):
        raise SystemExit(f"each table needs one pair of markers: {sorted(set(placed) ^ set(tables)) or placed}")
    stale = {path: new for path, text in pages.items() if (new := filled(text, tables)) != text}
    for path, new in stale.items():
        if check:
            print(f"{path.relative_to(DOCS.parent)} is out of date: run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(new, "utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
