"""``stableedit statistics``: second moments of keys and value gradients over plain text."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import add_json_option, add_model_options, new_parser, positive

_EXAMPLE = """\
  stableedit statistics --model smollm2-135m --text wiki.txt more.jsonl.gz --output stats.safetensors
  stableedit statistics --model smollm2-135m --text hub:wikimedia/wikipedia@20231101.en --tokens 1000000 \\
      --edit-modules '*.{4..8}.mlp.down_proj' --keys-only --output stats.safetensors

  Stopped and called again, it goes on from where it was; with more --tokens, too."""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "gather second moments of keys and value gradients over text, for editors that hold updates off it"
    parser = new_parser(commands, "statistics", summary, _EXAMPLE)
    add_model_options(parser)
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".txt with a running text, or .json, .jsonl, .csv with a text in each record, also with .gz; or "
        "hub:OWNER/NAME, hub:OWNER/NAME@CONFIG:SPLIT",
    )
    parser.add_argument("--field", metavar="NAME", help="of records that has the text (default: Text or text)")
    parser.add_argument("--output", required=True, metavar="FILE", help="save there, on the way and at the end")
    parser.add_argument(
        "--edit-modules",
        nargs="+",
        metavar="NAME",
        help="linear maps: names or patterns like '*.{4..8}.mlp.down_proj' (default: outputs of four late MLPs)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="stop after N tokens (default: 100 for each dimension of the widest key, or all there are)",
    )
    parser.add_argument(
        "--window", type=positive, metavar="N", help="tokens that the model sees together (default 512, or its context)"
    )
    parser.add_argument("--keys-only", action="store_true", help="no value gradients: a third of the time")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever --output holds")
    add_json_option(parser)
    return parser
