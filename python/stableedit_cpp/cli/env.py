"""``stableedit env``: what a bug report needs."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.options import show
from stableedit_cpp.files.environment import cmake_prefix, environment


def run(options: argparse.Namespace) -> int:
    found = {**environment(), "cmake prefix": str(cmake_prefix())}
    lines = [
        f"{name + ':':<22}{', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in found.items()
    ]
    show(options, found, "\n".join(lines))
    return 0
