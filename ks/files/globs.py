"""Names of layers and tensors, matched by globs over their components."""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ks.errors import one_line


def is_glob(name: str) -> bool:
    """Return whether a name has wildcards: *, ? or characters in brackets."""
    return re.search(r"[*?]|\[.+\]", name) is not None


def matches(name: str, glob: str) -> bool:
    """Return whether a name such as `encoder.layer.0.output.dense` matches a glob.

    Args:
        name: components joined by dots.
        glob: components joined by dots. `*` stands for any text within one component, `**` as a whole component for
            any number of components, also none; `?` and `[…]` work as in `fnmatch`.
    """
    return _match(name.split("."), glob.split("."))


def _match(parts: Sequence[str], globs: Sequence[str]) -> bool:
    if not globs:
        return not parts
    first, *rest = globs
    if first == "**":
        return _match(parts, rest) or (bool(parts) and _match(parts[1:], globs))
    return bool(parts) and fnmatchcase(parts[0], first) and _match(parts[1:], rest)


def matching(names: Iterable[str], globs: str | Sequence[str]) -> list[str]:
    """Return the names that match a glob, or at least one of several, in their order."""
    globs = [globs] if isinstance(globs, str) else globs
    return [name for name in names if any(matches(name, glob) for glob in globs)]


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return the known names that resemble a name most, and how many there are, for an error message."""
    known = list(known)
    found = difflib.get_close_matches(name, known, limit, cutoff=0.3) or known[:limit]
    return one_line(f"nearest of {len(known)}: {', '.join(found)}" if found else "it holds none")
