"""``stableedit datasets``: which formats there are, and what is in a file."""

from __future__ import annotations

import argparse
import json

from stableedit_cpp.cli.options import FILES, add_json_option, new_parser, positive, show
from stableedit_cpp.data import FORMATS, Format, describe, parse_fields
from stableedit_cpp.data.reading import format_of_training
from stableedit_cpp.data.variants import MOVABLE

__all__ = [
    "add_format_options",
    "add_parser",
    "add_variants_option",
    "add_warm_up_format_options",
    "reading_settings",
    "run",
    "variants_of",
    "warm_up_settings",
]

_EXAMPLE = """\
  stableedit datasets ls
  stableedit datasets show edits.jsonl.gz
  stableedit datasets show questions.json --fields prompt=question,target=answer"""
_SHOW_EXAMPLE = "  stableedit datasets show zsre_edit_5k.json --first 1"


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "datasets", "list the known data set formats, or look into a file", _EXAMPLE)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    listing = new_parser(actions, "ls", "list the known formats with their fields", "  stableedit datasets ls --json")
    listing.add_argument("--json", action="store_true", help="as JSON")
    look = new_parser(actions, "show", "format, number of records, missing fields and first requests", _SHOW_EXAMPLE)
    look.add_argument("source", metavar="FILE", help=FILES)
    look.add_argument("--first", type=positive, default=3, metavar="N", help="requests to show (default 3)")
    look.add_argument("--count", action="store_true", help="read to the end, also a file of more than 64 MB")
    add_format_options(look)
    add_json_option(look)
    return parser


def run(options: argparse.Namespace) -> int:
    if options.action == "show":
        count = True if options.count else None
        found = describe(options.source, first=options.first, count=count, **reading_settings(options))
        show(options, found.to_dict(), found)
    elif options.json:
        print(json.dumps({format_.name: dict(format_.fields) for format_ in FORMATS}, indent=2))
    else:
        print("\n\n".join(map(_text, FORMATS)))
    return 0


def _text(format_: Format) -> str:
    # A subject and an id are taken where there are any; they tell nothing of the format.
    shown = {name: own for name, own in format_.fields.items() if own not in ("subject", "id")}
    lines = [f"  {name:<18}{own}" for name, own in shown.items()]
    if format_.locality_suffix:
        lines.append(f"  {'':<18}({format_.fields['locality_prompt']} gets a {format_.locality_suffix!r} appended)")
    return "\n".join([format_.name, *lines])


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


def variants_of(options: argparse.Namespace) -> list[str]:
    """What ``add_variants_option`` was given."""
    return [name.strip() for name in options.variants.split(",")] if options.variants else []


def add_warm_up_format_options(parser: argparse.ArgumentParser) -> None:
    """How the training stream is to be read, where that is otherwise than the requests."""
    format_ = parser.add_mutually_exclusive_group()
    told = "told from its first record where the requests' format does not fit"
    format_.add_argument("--warm-up-format", metavar="NAME", help=f"format of the warm-up file (default: {told})")
    format_.add_argument("--warm-up-fields", metavar="MAP", help="fields of the warm-up file, as for --fields")


def warm_up_settings(options: argparse.Namespace) -> dict[str, object]:
    """What ``add_warm_up_format_options`` was given, or else ``add_format_options``, for the warm-up file."""
    how = reading_settings(options)
    if options.warm_up_fields is not None:
        return {**how, "format": parse_fields(options.warm_up_fields)}
    return {**how, "format": options.warm_up_format or format_of_training(options.warm_up, how["format"])}


def reading_settings(options: argparse.Namespace) -> dict[str, object]:
    """What ``add_format_options`` was given, as ``read_requests`` takes it."""
    format_ = parse_fields(options.fields) if options.fields is not None else options.format
    return {"format": format_, "seed": options.seed, "variants": variants_of(options)}
