"""The two kinds of error of the toolkit: UsageError is shown in one line, any other one is a fault of the program."""

import unicodedata


class UsageError(ValueError):
    """Something that the user gave cannot be used: one line with the value, what is allowed, and the remedy."""


class InternalError(Exception):
    """A result that cannot be right, such as a loss below its floor."""


def one_line(text: object, limit: int = 2000) -> str:
    """Return a text in one line without control characters, cut at a length; paths and library messages hold both."""
    escaped = "".join(_visible(character) for character in str(text).strip())
    return escaped if len(escaped) <= limit else escaped[:limit] + "…"


def _visible(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Cs"):
        return character
    return " " if character in "\n\t" else character.encode("unicode_escape", "surrogatepass").decode()
