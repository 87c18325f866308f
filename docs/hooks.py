"""Hooks of the site: what a page says of the repository's files is a link on the repository's pages, and a path here."""

import posixpath
import re

__all__ = ["on_page_markdown"]

_UPWARDS = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page, **_: object) -> str:
    """``[results](../bench/results/x.json)`` becomes ``results (`bench/results/x.json`)``."""
    markdown = markdown.replace("* [*My Project*](indexpage.md)", "")  # mkdoxy links a page that it does not write
    folder = posixpath.dirname(page.file.src_uri)

    def said(found: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[3]))
        if not path.startswith("../"):
            return found[0]  # a page of the site
        path, bare = path.removeprefix("../"), found[2].strip("`")
        return f"`{path}`" if bare in (path, posixpath.basename(path)) else f"{found[2]} (`{path}`)"

    return _UPWARDS.sub(said, markdown)
