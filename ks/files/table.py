"""Tables and sentences for a terminal, from the same declarations of columns as the files."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from ks.files.columns import Column, Text

WIDTH = 100
MIN_WRAPPED = 16  # characters that a wrapped column needs


def table(
    columns: Iterable[Column], rows: Iterable[Mapping[str, Any]], width: int = WIDTH, explained: set[str] | None = None
) -> str:
    """Return rows as lines of text, followed by the legends of the columns that are shown.

    A column without any value is left out, a missing value is "-". Texts are set to the left, numbers to the right, and
    a text in the last column is wrapped. A table that is too wide continues below, where its first column is repeated.

    Args:
        columns: to show, in this order; the first one identifies the rows.
        rows: the value of each column by its name. A string is shown as it is, everything else in the column's form.
        width: of a line, in characters.
        explained: legends of tables above, which are left out here; those of this table join them.
    """
    rows = list(rows)
    first, *others = (column for column in columns if any(not is_missing(row.get(column.name)) for row in rows))
    cells = {column.name: [cell(column, row.get(column.name)) for row in rows] for column in (first, *others)}
    widths = {name: max(map(len, [*_header(name), *texts])) for name, texts in cells.items()}
    blocks, left = [[first]], width - widths[first.name]
    for column in others:
        wraps = column is others[-1] and column.type is Text
        if left < 1 + (min(widths[column.name], MIN_WRAPPED) if wraps else widths[column.name]) and len(blocks[-1]) > 1:
            blocks.append([first])
            left = width - widths[first.name]
        if wraps:
            widths[column.name] = min(widths[column.name], max(left - 1, MIN_WRAPPED))
        blocks[-1].append(column)
        left -= 1 + widths[column.name]
    legends = [f"{column.name}: {column.legend}." for column in (first, *others) if column.legend]
    if explained is not None:
        legends = [legend for legend in legends if legend not in explained]
        explained.update(legends)
    return "\n".join(["\n\n".join(_block(block, cells, widths) for block in blocks), *filled(legends, width)])


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(" ".join(["|", " | ".join(line), "|"]) for line in lines)


def filled(sentences: Iterable[str], width: int = WIDTH) -> list[str]:
    """Return sentences in lines of a terminal; a line that continues a sentence is indented."""
    return [textwrap.fill(sentence, width, subsequent_indent="  ", break_on_hyphens=False) for sentence in sentences]


def _block(columns: list[Column], cells: Mapping[str, list[str]], widths: Mapping[str, int]) -> str:
    """Return columns beside each other, below their names."""
    height = max(len(_header(column.name)) for column in columns)
    entries = [[([""] * height + _header(column.name))[-height:] for column in columns]]
    for texts in zip(*(cells[column.name] for column in columns)):
        entries.append([textwrap.wrap(text, widths[c.name], break_on_hyphens=False) for c, text in zip(columns, texts)])
    lines = []
    for entry in entries:
        for number in range(max(1, *map(len, entry))):
            line = [lines_of[number] if number < len(lines_of) else "" for lines_of in entry]
            padded = (f"{text:{'<' if c.type is Text else '>'}{widths[c.name]}}" for c, text in zip(columns, line))
            lines.append(" ".join(padded).rstrip())
    return "\n".join(lines)


def cell(column: Column, value: Any) -> str:
    """Return a value in the form of its column; a string as it is, and "-" where there is none."""
    if is_missing(value):
        return "-"
    return value if isinstance(value, str) else column.form.format(value)


def is_missing(value: Any) -> bool:
    """Return whether a cell has no value: None, NaN or an empty text."""
    return value is None or value == "" or value != value


def _header(name: str) -> list[str]:
    """Return a name in one line if it is short, else in two, broken behind the underscore nearest to its middle."""
    places = [index + 1 for index, letter in enumerate(name) if letter == "_"]
    if len(name) <= 8 or not places:
        return [name]
    middle = min(places, key=lambda place: max(place, len(name) - place))
    return [name[:middle], name[middle:]]
