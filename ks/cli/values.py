"""Convert the text of a flag into a checked value; argparse reports what a converter refuses."""

import argparse
from collections.abc import Callable
from typing import Any

from ks.errors import one_line
from ks.files.columns import METRIC


def _number(convert: Callable[[str], Any], accept: Callable[[Any], bool], description: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{one_line(text, 60)!r} is not {description}")
        return value

    return parse


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], Any]:
    """Return a converter for whole numbers from low to high."""
    return _number(int, lambda value: low <= value <= high, f"a whole number from {low} to {high}")


def number(low: float, high: float) -> Callable[[str], Any]:
    """Return a converter for numbers from low to high."""
    return _number(float, lambda value: low <= value <= high, f"a number from {low:g} to {high:g}")


positive_int, non_negative_int, seed_number = integer(1), integer(0), integer(0, 2**63 - 1)
positive_float, non_negative_float = (
    number(1e-100, 1e100),
    _number(float, lambda value: value == 0 or 1e-100 <= value <= 1e100, "0 or a number from 1e-100 to 1e+100"),
)
open_fraction = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1, both excluded")
fraction = _number(float, lambda value: 0 < value <= 1, "a number above 0, at most 1")


def auto_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter that also accepts 'auto'."""
    return lambda text: text if text == "auto" else convert(text)


def path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty; . is the current folder")
    return text


def key(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a key must not be empty; leave the flag out if the file holds one tensor")
    return text


def metric_name(text: str) -> str:
    if not METRIC.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{one_line(text, 60)!r} cannot be the name of a metric")
    return text


def file_prefix(text: str) -> str:
    if not text or "/" in text or "\\" in text or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name prefix; it must not be empty or hold a path")
    return text
