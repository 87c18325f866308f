"""``stableedit session``: a stream of edits that lives in a directory; one file for a few related commands."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.options import new_parser
from stableedit_cpp.cli.session import begin, hold, look, ship, undo

__all__ = ["add_parser", "run"]

_EXAMPLE = """\
  stableedit session create edits/ --model smollm2-135m --warm-up training.json
  stableedit session edit edits/ --requests monday.jsonl
  stableedit session log edits/
  stableedit session revert edits/ r-5d41402abc4b

  A crash loses at most the turn in flight: give the same file again, and what was done is skipped."""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "session", "edit for months: journal, audits, rollback, revert, export", _EXAMPLE)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (begin, look, hold, undo, ship):
        module.add_parsers(actions)
    return parser


def run(options: argparse.Namespace) -> int:
    return options.action(options)
