"""``stableedit session``: a stream of edits that lives in a directory; one file for a few related commands."""

from __future__ import annotations

import argparse
import importlib

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    file, _, function = options.action.partition(".")
    return getattr(importlib.import_module(f"stableedit_cpp.cli.session.{file}"), function)(options)
