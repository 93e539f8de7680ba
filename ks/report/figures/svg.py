"""A figure as SVG inside an HTML page."""

import html
import io
import re

import matplotlib
from matplotlib.figure import Figure

LEFT_OUT = r"<style[^>]*>.*?</style>|<!--.*?-->|<\?xml[^>]*>|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>"


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element: text as shapes, so that no font is needed, and nothing to load.

    Args:
        figure: to draw; its first text, the finding, is read aloud instead of it.
        name: unique in the page; all ids start with it.
    """
    finding = figure.texts[0].get_text().replace("\n", " ").replace("\\$", "$")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = re.sub(LEFT_OUT, "", buffer.getvalue(), flags=re.DOTALL).strip()
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    head, _, body = svg.partition(">")
    (box,) = re.findall(r'viewBox="[\d. ]+"', head)
    return f'<svg {box} role="img" aria-label="{html.escape(finding)}">{body}'
