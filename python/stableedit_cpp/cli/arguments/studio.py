"""``stableedit studio``: a page on this machine over a session."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import add_guard_options, new_parser, positive
from stableedit_cpp.cli.arguments.session import add_opening_options

_EXAMPLE = """\
  stableedit studio edits/                          # a session that is there
  stableedit studio edits/ --model smollm2-135m     # or a new one, with the default editor
  ssh -L 7860:localhost:7860 HOST                   # the page of another machine, at home

  Ctrl-C ends it after the turn in flight, a second one drops that. A crash loses at most that
  turn; give a file again to go on with it."""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "edit on a page in the browser: ask, edit, audit, repair, revert, roll back, export"
    parser = new_parser(commands, "studio", summary, _EXAMPLE)
    parser.add_argument("directory", metavar="DIR", help="directory of the session; with --model, also a new one")
    parser.add_argument("--port", type=positive, metavar="N", help="default: the first free one from 7860 on")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    parser.add_argument("--token", help="that visitors need with another --host (default: one is made and printed)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")
    add_guard_options(parser)
    add_opening_options(parser)
    return parser
