"""``stableedit evaluate``: score a model, edited or not."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.datasets import add_format_options
from stableedit_cpp.cli.arguments.options import (
    FILES,
    OWN_TEMPLATE,
    add_form_options,
    add_json_option,
    add_metrics_option,
    add_model_options,
    new_parser,
    positive,
)

_EXAMPLE = """\
  stableedit evaluate --model edited/ --reference smollm2-135m --requests edits.jsonl --output scores.json
  stableedit evaluate --model edited/ --requests edits.jsonl --metrics accuracy     # the published three alone"""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "score efficacy, generalization, specificity, free answers and locality, with standard errors"
    parser = new_parser(commands, "evaluate", summary, _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--requests", required=True, metavar="FILE", help=FILES)
    add_format_options(parser)
    own = "whether the unedited model's own answers stay; comes with --reference"
    add_metrics_option(parser, own, ("accuracy", "generation"))
    parser.add_argument("--reference", metavar="MODEL", help="the unedited model, as for --model; turns on locality")
    known = "as it was edited, where its directory says so, or else"
    add_form_options(parser, chat=f"{known} {OWN_TEMPLATE}", end="not", split=f"{known} text")
    parser.add_argument("--output", metavar="FILE", help="save scores and per-request values as JSON")
    parser.add_argument(
        "--per-request",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="values of every request in the JSON; without them a stream of any length is scored in constant memory",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="score only the first N requests")
    add_json_option(parser)
    return parser
