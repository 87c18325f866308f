"""``stableedit models``: which architectures were tried."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import add_json_option, new_parser

_EXAMPLE = """\
  stableedit models
  stableedit models qwen --json

  What an architecture's cell says is measured by the tests, on a tiny random model; docs/models.md says how."""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(
        commands, "models", "list the architectures that were tried: default modules, and what works", _EXAMPLE
    )
    parser.add_argument("name", nargs="?", help="only those with this in their name")
    add_json_option(parser)
    return parser
