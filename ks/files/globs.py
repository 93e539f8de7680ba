"""Names of layers and tensors, matched by globs over their components."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from ks.errors import UsageError, one_line


def is_glob(name: str) -> bool:
    """Return whether a name has wildcards: *, ? or several characters in brackets; blocks[0] is a name."""
    return re.search(r"[*?]|\[..+\]", name) is not None


def matches(name: str, glob: str) -> bool:
    """Return whether a name such as `encoder.layer.0.output.dense` matches a glob.

    Args:
        name: components joined by dots.
        glob: components joined by dots. `*` stands for any text within one component, `**` as a whole component for
            any number of components, also none; `?` and `[…]` work as in `fnmatch`. A name matches itself.
    """
    return name == glob or _match(name.split("."), glob.split("."))


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


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known names that resemble a name most, and how many there are, for an error message."""
    known = [each for each in known if each]  # a model is a module of itself, with an empty name
    found = difflib.get_close_matches(name, known, cutoff=0.3) or known[:3]
    return one_line(f"nearest of {len(known)}: {', '.join(found)}" if found else "it holds none")


def find_weight(known_keys: Collection[str], key: str, where: str, what: str = "inputs") -> str:
    """Return the key of a weight as a file, or a model, spells it.

    Exact keys come first, then names of layers, then the one key that differs by a prefix of up to three components,
    as `bert.encoder.layer.0.output.dense.weight` does from `encoder.layer.0.output.dense.weight`.

    Args:
        key: of the weight in its checkpoint, or the name of its layer.
        where, what: the file or the model, and what is looked for, for messages.
    Raises:
        UsageError: no key fits, or several do.
    """
    for spelling in (key, f"{key}.weight"):
        if spelling in known_keys:
            return spelling
    behind_prefix = [known for known in known_keys if _differ_by_prefix(known, key)]
    if len(behind_prefix) == 1:
        return behind_prefix[0]
    if behind_prefix:
        fitting = one_line(", ".join(behind_prefix), 300)
        raise UsageError(f"{where}: key {one_line(key)!r} fits {fitting}; give one of them in full")
    raise UsageError(f"{where}: no {what} for key {one_line(key)!r}; {nearest(key, known_keys)}")


def _differ_by_prefix(one: str, other: str) -> bool:
    """Return whether one name is the other with one to three components before it."""
    shorter, longer = sorted((one, other), key=len)
    return "." in shorter and longer.endswith(f".{shorter}") and longer.removesuffix(f".{shorter}").count(".") < 3
