"""Tables and sentences for a terminal: names of columns broken at underscores, long texts wrapped, no wide line."""

import textwrap
from collections.abc import Iterable

WIDTH = 100
NARROW = 16  # characters that a wrapped column needs


def text_table(columns: dict[str, list[str]], wrapped: str | None = None, width: int = WIDTH) -> str:
    """Return a table; if it is too wide, several ones below each other that repeat the first column.

    Args:
        columns: name and cells of each column, the first one identifies the rows.
        wrapped: a column that is set to the left and wrapped; all others are set to the right.
        width: of a line, in characters.
    """
    first, *names = columns
    headers = {name: _broken(name) for name in columns}
    natural = {name: max(map(len, [*headers[name], *columns[name]])) for name in columns}
    blocks: list[list[str]] = [[]]
    for name in names:
        minimum = min(natural[name], NARROW) if name == wrapped else natural[name]
        if blocks[-1] and natural[first] + sum(1 + natural[other] for other in blocks[-1]) + 1 + minimum > width:
            blocks.append([])
        blocks[-1].append(name)
    return "\n\n".join(_block([first, *block], columns, headers, natural, wrapped, width) for block in blocks)


def filled(sentences: Iterable[str], width: int = WIDTH) -> list[str]:
    """Return sentences in lines of a terminal; a line that continues a sentence is indented."""
    return [textwrap.fill(sentence, width, subsequent_indent="  ", break_on_hyphens=False) for sentence in sentences]


def _block(names: list[str], columns: dict, headers: dict, natural: dict, wrapped: str | None, width: int) -> str:
    widths = {name: natural[name] for name in names}
    if wrapped in names:
        widths[wrapped] = min(natural[wrapped], width - sum(widths[name] + 1 for name in names if name != wrapped))
    height = max(len(headers[name]) for name in names)
    rows = [{name: ([""] * height + headers[name])[-height:] for name in names}]
    for index in range(len(columns[names[0]])):
        cells = {name: columns[name][index] for name in names}
        rows.append(
            {name: textwrap.wrap(cell, widths[name], break_on_hyphens=False) or [""] for name, cell in cells.items()}
        )
    lines = []
    for row in rows:
        for number in range(max(map(len, row.values()))):
            texts = (row[name][number] if number < len(row[name]) else "" for name in names)
            padded = (text.ljust(widths[n]) if n == wrapped else text.rjust(widths[n]) for n, text in zip(names, texts))
            lines.append(" ".join(padded).rstrip())
    return "\n".join(lines)


def _broken(name: str) -> list[str]:
    """Return a name in one line if it is short, else in two, broken behind the underscore nearest to its middle."""
    places = [index + 1 for index, letter in enumerate(name) if letter == "_"]
    if len(name) <= 8 or not places:
        return [name]
    middle = min(places, key=lambda place: max(place, len(name) - place))
    return [name[:middle], name[middle:]]
