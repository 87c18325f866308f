"""``stableedit plan``: what a stream of edits will need, before anything is edited."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.choose_modules import add_choice_option
from stableedit_cpp.cli.arguments.datasets import add_format_options
from stableedit_cpp.cli.arguments.options import (
    FILES,
    add_editor_options,
    add_guard_options,
    add_json_option,
    add_model_options,
    new_parser,
    positive,
)

_EXAMPLE = """\
  stableedit plan --model smollm2-135m --requests edits.jsonl
  stableedit plan --model smollm2-135m --requests edits.jsonl --preset one-pass --turn-size 50 --json

  Takes what `stableedit edit` takes. Two turns, that with the most to do and a usual one, are edited, measured and
  taken back; nothing is saved."""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "say what a stream of edits will need: memory by part, hours, disk"
    parser = new_parser(commands, "plan", summary, _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--requests", required=True, metavar="FILE", help=FILES)
    parser.add_argument("--limit", type=positive, metavar="N", help="plan for only the first N requests")
    add_format_options(parser)
    add_editor_options(parser)
    add_choice_option(parser)
    add_guard_options(parser)
    add_json_option(parser)
    return parser
