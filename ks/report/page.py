"""The look of every page, which is one file that needs neither network nor scripts: its style and its parts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ks.files.atomic import atomic_path
from ks.files.columns import Column, Text
from ks.files.table import cell, is_missing

BREAKS = re.compile(r"(?<=\D)([._/])(?=\w)")  # in names of weights and folders, where a line may end
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5a5a5a; --line: #d8d8d8; --page: #fff; --card: #f6f6f4; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --soft: #a8a8a4; --line: #3c3c3a; --page: #161616; --card: #212120; }
  figure svg { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0.4rem 0; max-width: 48rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 48rem; margin: 0.3rem 0; }
ul { padding-left: 1.2rem; }
.soft, figcaption, th, dt { color: var(--soft); }
a { color: inherit; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 3.6rem; }
th.text, td.text { text-align: left; white-space: normal; min-width: 6rem; max-width: 15rem; }
td.text:first-child { min-width: 9rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); background-clip: padding-box; }
.figures { columns: 26rem; column-gap: 1.4rem; }
figure { margin: 0 0 1.4rem; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: 0.85rem; }
pre { background: var(--card); padding: 0.7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.85rem; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dt { margin-top: 0.4rem; } }
@media print {
  @page { margin: 15mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  h1 { font-size: 15pt; } h2 { break-after: avoid; }
  figure, tr, pre, dl { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 8.5pt; } th, td { padding: 0.15rem 0.3rem; }
  th.text, td.text { min-width: 0; }
  .figures { columns: 2; }
}
"""


def write_page(path: Path, name: str, sentences: Sequence[str], sections: Iterable[tuple[str, str]]) -> None:
    """Write a page atomically.

    Args:
        path: of the page.
        name: small, above everything else.
        sentences: the first one is the heading, the others stand below it.
        sections: title and content of each, as HTML; those without content are left out.
    """
    body = "\n".join(
        f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" for title, content in sections if content
    )
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="soft">{escape(name)}</p>
<h1>{escape(sentences[0])}</h1>
{items(sentences[1:])}
</header>
{body}
</body>
</html>
"""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def items(sentences: Iterable[str]) -> str:
    """Return sentences as a list."""
    found = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{found}</ul>" if found else ""


def definitions(pairs: Mapping[str, str | None]) -> str:
    """Return terms with their texts; a term without one is left out."""
    known = {term: text for term, text in pairs.items() if text}
    found = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in known.items())
    return f"<dl>{found}</dl>" if found else ""


def figures(drawn: Iterable[tuple[str, str]]) -> str:
    """Return figures, each an <svg> and its caption, in as many columns as the page has room for."""
    found = "".join(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in drawn)
    return f'<div class="figures">{found}</div>' if found else ""


def commands(lines: Sequence[str]) -> str:
    """Return commands to copy."""
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>" if lines else ""


def links(page: Path, others: Mapping[str, Path]) -> dict[str, str]:
    """Return the addresses of other pages, by name, which stay true when the folder of a page moves.

    Those that do not exist or are not below this folder are left out.
    """
    folder = page.parent
    below = {name: path for name, path in others.items() if path.is_file() and path.is_relative_to(folder)}
    return {name: quote(path.relative_to(folder).as_posix()) for name, path in below.items()}


def table(
    shown: Sequence[Column], rows: Sequence[Mapping[str, Any]], unit: str = "", links: Mapping[str, str] = {}
) -> str:
    """Return rows, if there are any, as a table with the columns that have a value.

    A column's description is its tooltip.

    Args:
        shown: columns.
        rows: the value of each column by its name.
        unit: the headings of columns with this unit end with it.
        links: the addresses of texts in the first column.
    """
    if not rows:
        return ""
    shown = [column for column in shown if any(not is_missing(row.get(column.name)) for row in rows)]
    classes = [' class="text"' if column.type is Text else "" for column in shown]
    names = [column.name.replace("_", " ") + (f", {unit}" if unit and column.unit == unit else "") for column in shown]
    heads = "".join(
        f'<th scope="col"{kind} title="{escape(column.description)}">{escape(name)}</th>'
        for kind, name, column in zip(classes, names, shown)
    )
    lines = []
    for row in rows:
        texts = [BREAKS.sub(r"\1<wbr>", escape(cell(column, row.get(column.name)))) for column in shown]
        if address := links.get(row.get(shown[0].name, "")):
            texts[0] = f'<a href="{escape(address)}">{texts[0]}</a>'
        lines.append("<tr>" + "".join(f"<td{kind}>{text}</td>" for kind, text in zip(classes, texts)) + "</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
