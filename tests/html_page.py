"""A page of a report, parsed."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """A page as (tag, attributes) in order, its text, and what would be loaded; unbalanced tags raise."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.loads, self.open = [], [], [], []
        self.feed(text.replace("<wbr>", ""))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        loading = [value for name, value in attributes if name.split(":")[-1] in ("src", "href", "srcset", "data")]
        self.loads += [value for value in loading if not value.startswith("#")]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
