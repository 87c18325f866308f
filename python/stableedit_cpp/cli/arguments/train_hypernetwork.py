"""``stableedit train-hypernetwork``: train the hypernetwork of RLEdit or MALMEN, into a file to begin with."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.datasets import add_format_options
from stableedit_cpp.cli.arguments.options import (
    add_editor_options,
    add_json_option,
    add_model_options,
    new_parser,
    positive,
)

_EXAMPLE = """\
  stableedit train-hypernetwork --model smollm2-135m --requests zsre_train.json --limit 2000 --output rledit.safetensors
  stableedit edit --model smollm2-135m --hypernetwork rledit.safetensors --requests edits.jsonl --output edited/

  Every request needs a rephrase and an unrelated prompt with its answer (rephrase, locality_prompt, locality_target, or
  what these are called in a published data set). The model is left as it is; the file holds the network, the running
  statistics, and what tells this model and its edited modules from others. A training that was stopped goes on."""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "train-hypernetwork", "train the hypernetwork of RLEdit or MALMEN", _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--requests", required=True, metavar="FILE", help=".json, .jsonl or .csv, also with .gz")
    parser.add_argument("--limit", type=positive, metavar="N", help="train on only the first N requests")
    parser.add_argument("--output", required=True, metavar="FILE", help="safetensors file for what was trained")
    add_format_options(parser)
    add_editor_options(parser, default="rledit")
    add_json_option(parser)
    return parser
