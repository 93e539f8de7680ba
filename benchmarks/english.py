"""English text that is at hand: docstrings of three Python packages, and the descriptions of the installed ones.

Both are read from files, without importing the packages.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

TEXT_PACKAGES = ("pandas", "matplotlib", "networkx")
DOCSTRINGS_PER_FILE = PARAGRAPHS_PER_PACKAGE = 20  # so that no large file makes up the text
PROSE = 0.8  # of the characters of a paragraph are letters and spaces; tables and badges have fewer


def source_files() -> list[Path]:
    """Return the source files of the text packages, without tests, in an order that mixes the packages.

    The order is that of the hashes of their paths inside the packages: the same on every machine.
    """
    files = {}
    for package in TEXT_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed: pip install --no-deps -r requirements-examples.txt")
        root = Path(spec.origin).parent
        inside = {path: path.relative_to(root.parent) for path in root.rglob("*.py")}
        files |= {path: name.as_posix() for path, name in inside.items() if "tests" not in name.parts}
    return sorted(files, key=lambda path: _sha256(files[path]))


def docstrings(files: Iterable[Path], seen: set[str]) -> Iterator[str]:
    """Yield docstrings of at least 40 characters, in the order of the files.

    Args:
        files: source files.
        seen: texts that are left out; those of the files are added.
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in files:
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
        texts = dict.fromkeys(ast.get_docstring(node) or "" for node in nodes)
        fresh = [text for text in texts if len(text) >= 40 and text not in seen]
        seen.update(fresh)
        yield from fresh[:DOCSTRINGS_PER_FILE]


def descriptions() -> Iterator[str]:
    """Yield paragraphs of prose out of the descriptions of the installed packages, in the order of a hash of names."""
    found = {package.metadata["Name"]: package for package in importlib.metadata.distributions()}
    for name in sorted(found, key=_sha256):
        blocks = re.split(r"\n\s*\n", str(found[name].metadata.get_payload()))
        paragraphs = (" ".join(block.split()) for block in blocks)
        prose = (text for text in paragraphs if len(text) >= 80 and _letters(text) >= PROSE * len(text))
        yield from list(dict.fromkeys(prose))[:PARAGRAPHS_PER_PACKAGE]


def _letters(text: str) -> int:
    return sum(character.isalpha() or character == " " for character in text)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
