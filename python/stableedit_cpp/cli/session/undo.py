"""``stableedit session rollback`` and ``revert``."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.session.common import add_opening_options, new_action, opened, print_json

_ROLLBACK = "  stableedit session rollback edits/ --to-turn 12    # see: stableedit session log edits/"

_REVERT = """\
  stableedit session revert edits/ r-5d41402abc4b    # ids: stableedit session log edits/ --requests
  stableedit session revert edits/ r-5d41402abc4b r-7d793037a076 --others all --json"""


def add_parsers(actions) -> None:
    summary = "go back to how the model was after a turn, bit for bit"
    parser = new_action(actions, "rollback", summary, _ROLLBACK, rollback)
    parser.add_argument("--to-turn", type=int, required=True, metavar="N", help="0 is before the first")
    add_opening_options(parser)

    summary = "take requests out of the model and bring the unedited answers back"
    parser = new_action(actions, "revert", summary, _REVERT, revert)
    parser.add_argument("ids", nargs="+", metavar="ID", help="of the request")
    parser.add_argument(
        "--others",
        type=_count,
        default=200,
        metavar="N",
        help="so many other requests are held in place and scored before and after, or: all (default 200)",
    )
    parser.add_argument(
        "--only-take-out", action="store_true", help="only take out what they added; do not bring answers back"
    )
    parser.add_argument("--json", action="store_true", help="report as JSON")
    add_opening_options(parser)


def rollback(options: argparse.Namespace) -> int:
    with opened(options) as session:
        session.rollback(options.to_turn, progress=True)
    print(session.status())
    return 0


def revert(options: argparse.Namespace) -> int:
    with opened(options) as session:
        report = session.revert(options.ids, others=options.others, bring_back=not options.only_take_out, progress=True)
    if options.json:
        print_json(report)
    else:
        print(report)
    return 0


def _count(text: str) -> int | None:
    """argparse type: a whole number, or all."""
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'all'")
    return int(text)
