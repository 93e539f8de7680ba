"""The identity of what a person edits in `train_with_random.py`: a text for its criterion, and one for its metrics.

The texts come from the source alone, so that a sweep knows them without importing the script. They cover the
statements that bind `criterion` and `metrics` at the top level, those of every name that they mention, and the versions
of imported libraries or the content of imported files. Data that the script reads from files is not covered.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from ks.errors import UsageError, one_line

OURS = "mean_squared_error"
HOME = "ks.training.criterion"  # the module of ours; importing it here would be a cycle
LONGEST_EXPRESSION = 60  # characters of an expression that is its own identity


@dataclass(frozen=True)
class Edits:
    """What identifies criterion and metrics; the defaults are those of the toolkit."""

    criterion: str = OURS
    metrics: str = "none"

    @property
    def criterion_is_ours(self) -> bool:
        """Return whether the criterion is the toolkit's mean squared error, so that floors and verdicts exist."""
        return self.criterion == OURS


TOOLKIT = Edits()


def edits_of(script: str | Path) -> Edits:
    """Return the identity of criterion and metrics in a training script.

    `EXPRESSION of LIBRARY VERSION` for a function or module of a library, `user-defined sha256 HASH` for one that is
    defined in the script; `mean_squared_error` for the toolkit's own, `none` for no metrics.

    Raises:
        UsageError: the script cannot be parsed, or defines no criterion.
    """
    text = Path(script).read_text(encoding="utf-8")
    try:
        source = _Source(text)
    except SyntaxError as error:
        raise UsageError(f"{script}, line {error.lineno}: {error.msg}") from error
    if "criterion" not in source.bindings:
        raise UsageError(f"{script} defines no criterion at its top level; add: criterion = {OURS}")
    return Edits(source.identity("criterion"), source.identity("metrics"))


class _Source:
    """The top-level statements of a script by the names that they bind."""

    def __init__(self, text: str):
        self.bindings: dict[str, list[ast.stmt]] = {}
        for statement in ast.parse(text).body:
            for name in _bound_by(statement):
                self.bindings.setdefault(name, []).append(statement)

    def identity(self, name: str) -> str:
        statements = self.bindings.get(name, [])
        if not statements or (len(statements) == 1 and _returns_nothing(statements[0])):
            return "none"
        used = self._closure(name)
        origins = dict(pair for statement in used for pair in _origins(statement))
        expression = self._expression(name)
        if expression == f"{HOME}.{OURS}":
            return OURS
        imported_alone = len([one for one in used if not isinstance(one, ast.Import | ast.ImportFrom)]) <= 1
        versioned = not any(origin.startswith("sha256") for origin in origins.values())
        if expression and imported_alone and versioned and len(expression) <= LONGEST_EXPRESSION:
            libraries = ", ".join(f"{library} {version}" for library, version in sorted(origins.items()) if version)
            return f"{expression} of {libraries}" if libraries else expression
        parts = [ast.unparse(statement) for statement in used]  # without comments and layout
        content = "\n".join([*parts, *(f"{origin} {found}" for origin, found in sorted(origins.items()))])
        shown = one_line(expression or "user-defined", LONGEST_EXPRESSION)
        return f"{shown} sha256 {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def _closure(self, name: str) -> list[ast.stmt]:
        """Return the statements that bind a name or any name that these mention, in the order of the script."""
        waiting, names, found = [name], {name}, {}
        while waiting:
            for statement in self.bindings[waiting.pop()]:
                found[statement.lineno, statement.col_offset] = statement
                mentioned = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
                waiting += mentioned & self.bindings.keys() - names
                names |= mentioned
        return [found[place] for place in sorted(found)]

    def _expression(self, name: str) -> str:
        """Return the value that a name is bound to by one assignment or import, qualified; empty for anything else."""
        match self.bindings.get(name):
            case [ast.ImportFrom(module=module, names=names)]:
                original = {alias.asname or alias.name: alias.name for alias in names}[name]
                return f"{module}.{original}"
            case [ast.Assign(value=ast.Name(id=other))]:
                return self._expression(other) or other
            case [ast.Assign(value=value)]:
                return ast.unparse(value)
        return ""


def _bound_by(statement: ast.stmt) -> set[str]:
    """Return the names that a top-level statement binds or changes."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(getattr(node, "ctx", None), ast.Store):
            while isinstance(node, ast.Attribute | ast.Subscript):  # LIMITS["low"] = 1 changes LIMITS
                node = node.value
            if isinstance(node, ast.Name):
                names.add(node.id)
    return names


def _origins(statement: ast.stmt) -> list[tuple[str, str]]:
    """Return, for an import, the library with its version, or the module with the hash of its file."""
    match statement:
        case ast.Import(names=names):
            return [_origin(alias.name) for alias in names]
        case ast.ImportFrom(module=module):
            return [_origin(module or "")]
    return []


def _origin(module: str) -> tuple[str, str]:
    library = module.split(".")[0]
    if library in sys.stdlib_module_names:
        return library, ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return library, importlib.metadata.version(library).split("+")[0]
    try:
        spec = importlib.util.find_spec(module)
        content = Path(spec.origin).read_bytes() if spec and spec.origin else b""
    except (ImportError, ValueError, OSError):
        content = b""
    return module, f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def _returns_nothing(statement: ast.stmt) -> bool:
    """Return whether a function does nothing but return an empty dict, beside its docstring."""
    if not isinstance(statement, ast.FunctionDef):
        return False
    body = statement.body[1:] if ast.get_docstring(statement) else statement.body
    return [ast.unparse(line) for line in body] == ["return {}"]
