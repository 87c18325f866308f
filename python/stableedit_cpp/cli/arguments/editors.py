"""``stableedit editors``: which editors there are."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import add_json_option, new_parser

_EXAMPLE = "  stableedit editors\n  stableedit editors --json"


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "editors", "list the editors, and their settings by name", _EXAMPLE)
    add_json_option(parser)
    return parser
