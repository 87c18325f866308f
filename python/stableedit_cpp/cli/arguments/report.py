"""``stableedit report``: results as a page for people."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import add_json_option, new_parser

_EXAMPLE = """\
  stableedit report results/
  stableedit report zsre-results/ counterfact-results/ --output report/ --title "SmolLM2-135M, 5,000 edits"

  The page needs no network and nothing beside it; charts/ holds its charts as PNG files."""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "write a page with tables and charts from results of stableedit bench"
    parser = new_parser(commands, "report", summary, _EXAMPLE)
    parser.add_argument("results", nargs="+", metavar="DIR", help="run directories, or directories above them")
    parser.add_argument("--output", default="report", metavar="DIR", help="new directory (default report)")
    parser.add_argument("--title", default="Benchmark report", metavar="TEXT", help="heading of the page")
    parser.add_argument("--overwrite", action="store_true", help="replace an output directory that has content")
    add_json_option(parser)
    return parser
