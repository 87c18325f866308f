"""``stableedit env``: what a bug report needs."""

from __future__ import annotations

import argparse
import json

from stableedit_cpp.cli.options import new_parser
from stableedit_cpp.files.environment import cmake_prefix, environment

_EXAMPLE = "  stableedit env --json > environment.json"


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "env", "print what a bug report needs", _EXAMPLE)
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    found = {**environment(), "cmake prefix": str(cmake_prefix())}
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name + ':':<22}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0
