"""``stableedit datasets``, and how the records of any command's data set are to be read."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import FILES, add_json_option, new_parser, positive
from stableedit_cpp.data.variants import MOVABLE

_EXAMPLE = """\
  stableedit datasets ls
  stableedit datasets show edits.jsonl.gz
  stableedit datasets show questions.json --fields prompt=question,target=answer"""
_SHOW_EXAMPLE = "  stableedit datasets show zsre_edit_5k.json --first 1"


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "datasets", "list the known data set formats, or look into a file", _EXAMPLE)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    listing = new_parser(actions, "ls", "list the known formats with their fields", "  stableedit datasets ls --json")
    add_json_option(listing)
    look = new_parser(actions, "show", "format, number of records, missing fields and first requests", _SHOW_EXAMPLE)
    look.add_argument("source", metavar="FILE", help=FILES)
    look.add_argument("--first", type=positive, default=3, metavar="N", help="requests to show (default 3)")
    look.add_argument("--count", action="store_true", help="read to the end, also a file of more than 64 MB")
    add_format_options(look)
    add_json_option(look)
    return parser


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """How the records of all data sets of a command are to be read."""
    format_ = parser.add_mutually_exclusive_group()
    format_.add_argument("--format", metavar="NAME", help="data set format (default: told from the first record)")
    format_.add_argument(
        "--fields", metavar="MAP", help="fields of any other data set, e.g. prompt=question,target=answer,rephrase=para"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice among paraphrases (default 0)")
    add_variants_option(parser)


def add_variants_option(parser) -> None:
    parser.add_argument(
        "--variants",
        metavar="NAMES",
        help=f"questions that are edited with their request instead of scored, e.g. rephrase (of {', '.join(MOVABLE)})",
    )


def add_warm_up_format_options(parser: argparse.ArgumentParser) -> None:
    """How the training stream is to be read, where that is otherwise than the requests."""
    format_ = parser.add_mutually_exclusive_group()
    told = "told from its first record where the requests' format does not fit"
    format_.add_argument("--warm-up-format", metavar="NAME", help=f"format of the warm-up file (default: {told})")
    format_.add_argument("--warm-up-fields", metavar="MAP", help="fields of the warm-up file, as for --fields")
