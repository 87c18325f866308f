"""``stableedit edit``: edit a model and save it."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.choose_modules import add_choice_option
from stableedit_cpp.cli.arguments.datasets import add_format_options, add_warm_up_format_options
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
  stableedit edit --model smollm2-135m --requests edits.jsonl --evaluate --output edited/
  stableedit edit --model smollm2-135m --requests edits.jsonl --preset one-pass --warm-up training.json --output fast/
  stableedit edit --model smollm2-135m --requests edits.jsonl --patch capital.safetensors
  torchrun --nproc-per-node 4 -m stableedit_cpp edit --model smollm2-135m --requests edits.jsonl --output edited/

  edits.jsonl has one request a line:
    {"prompt": "The capital of Australia is", "target": "Canberra", "rephrase": "Australia's capital is called"}"""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "edit", "edit a model with a file of requests and save the result", _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--requests", required=True, metavar="FILE", help=FILES)
    parser.add_argument("--output", metavar="DIR", help="new directory for model, config and report")
    parser.add_argument(
        "--patch", metavar="FILE", help="safetensors file for what was added, to patch a C++ server with"
    )
    parser.add_argument("--warm-up", metavar="FILE", help="training stream that is edited first and stays in the model")
    add_format_options(parser)
    add_warm_up_format_options(parser)
    add_editor_options(parser)
    add_choice_option(parser)
    add_guard_options(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="edit only the first N requests")
    parser.add_argument("--warm-up-limit", type=positive, metavar="N", help="warm up with only the first N requests")
    parser.add_argument("--repairs", type=positive, metavar="N", help="rounds of solving again for what does not hold")
    parser.add_argument(
        "--shrink", type=float, metavar="X", help="at last keep only this share of the whole change, e.g. 0.85"
    )
    parser.add_argument("--evaluate", action="store_true", help="score all requests afterwards, into the report")
    parser.add_argument("--overwrite", action="store_true", help="replace an output directory that has content")
    add_json_option(parser)
    return parser
