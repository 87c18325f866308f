"""``stableedit env``: what a bug report needs."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import add_json_option, new_parser

_EXAMPLE = "  stableedit env --json > environment.json"


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "env", "print what a bug report needs", _EXAMPLE)
    add_json_option(parser)
    return parser
