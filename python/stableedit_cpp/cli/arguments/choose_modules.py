"""``stableedit choose-modules``: which modules of a model take edits best; and the choice that other commands make."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.datasets import add_format_options
from stableedit_cpp.cli.arguments.options import (
    FILES,
    add_editor_options,
    add_json_option,
    add_model_options,
    new_parser,
    positive,
)

_EXAMPLE = """\
  stableedit choose-modules --model smollm2-135m --requests edits.jsonl
  stableedit choose-modules --model smollm2-135m --requests zsre_edit.json --limit 64 --json

  Tries a few sets of modules, depth by depth, on up to 64 of the requests, and takes each trial back. The star marks
  the set that is chosen; what was measured on 50 requests or more is remembered for this model, and
  `stableedit edit` edits in it."""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "choose-modules", "measure which modules of a model take edits best", _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--requests", required=True, metavar="FILE", help=FILES)
    parser.add_argument("--limit", type=positive, metavar="N", help="look only at the first N requests")
    add_format_options(parser)
    add_editor_options(parser)
    add_json_option(parser)
    return parser


def add_choice_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--choose-modules",
        action=argparse.BooleanOptionalAction,
        help="measure which modules are best, or take those named or the fixed rule (default: measure where none are "
        "named, the step size is automatic and there are 50 requests or more, unless it was measured before)",
    )
