"""Hooks of the site: what a page says of the repository's files is a link on the repository's pages, and a path here."""

import re

__all__ = ["on_page_markdown"]

_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """``[results](../bench/results/x.json)`` becomes ``results (`bench/results/x.json`)``."""
    markdown = markdown.replace("* [*My Project*](indexpage.md)", "")  # mkdoxy links a page that it does not write
    return _OUTSIDE.sub(lambda found: _said(found[2], found[3]), markdown)


def _said(text: str, path: str) -> str:
    bare = text.strip("`")
    return f"`{path}`" if bare in (path, path.rpartition("/")[2]) else f"{text} (`{path}`)"
