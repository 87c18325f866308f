"""``stableedit session``: a stream of edits that lives in a directory."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.choose_modules import add_choice_option
from stableedit_cpp.cli.arguments.datasets import add_format_options, add_warm_up_format_options
from stableedit_cpp.cli.arguments.export import add_export_options
from stableedit_cpp.cli.arguments.options import (
    FILES,
    add_editor_options,
    add_form_options,
    add_guard_options,
    add_json_option,
    add_metrics_option,
    add_model_options,
    add_trust_option,
    new_parser,
    positive,
)
from stableedit_cpp.cli.arguments.placement import add_placement_options

__all__ = ["add_opening_options", "add_parser"]

_EXAMPLE = """\
  stableedit session create edits/ --model smollm2-135m --warm-up training.json
  stableedit session edit edits/ --requests monday.jsonl
  stableedit session log edits/
  stableedit session revert edits/ r-5d41402abc4b

  A crash loses at most the turn in flight: give the same file again, and what was done is skipped."""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "session", "edit for months: journal, audits, rollback, revert, export", _EXAMPLE)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_begin, _add_look, _add_hold, _add_undo, _add_ship):
        add(actions)
    return parser


def _action(actions, name: str, summary: str, example: str, action: str) -> argparse.ArgumentParser:
    """A session command; the first argument of each is the directory.

    Args:
        action: what does it, file and function of ``cli/session/``.
    """
    parser = new_parser(actions, name, summary, example)
    parser.set_defaults(action=action)
    parser.add_argument("directory", metavar="DIR", help="directory of the session")
    return parser


def add_opening_options(parser: argparse.ArgumentParser) -> None:
    """Of commands that open a session for writing."""
    parser.add_argument("--model", help="where the session's model is now (default: where it was created from)")
    add_placement_options(parser)
    add_trust_option(parser)
    parser.add_argument(
        "--inexact",
        action="store_true",
        help="accept other last digits where another machine has to do turns again",
    )


_CREATE = """\
  stableedit session create edits/ --model smollm2-135m
  stableedit session create fast/ --model smollm2-135m --preset one-pass --warm-up training.json --warm-up-limit 500"""
_EDIT = """\
  stableedit session edit edits/ --requests monday.jsonl

  What is done is skipped, so the same file can be given again after a crash; what was reverted or superseded since is
  edited again. A request is known again by its prompt, its target, its variants and, if it has one, its "id".

  Shared among 4 processes, of which the first writes (docs/scale.md):
  torchrun --nproc-per-node 4 -m stableedit_cpp session edit edits/ --requests monday.jsonl"""


def _add_begin(actions) -> None:
    parser = _action(actions, "create", "begin a session with an unedited model", _CREATE, "begin.create")
    add_model_options(parser)
    add_editor_options(parser)
    add_choice_option(parser)
    parser.add_argument(
        "--detail",
        choices=["factors", "requests"],
        default="factors",
        help="what the journal holds: factors (turns are done again without running the model; default) or only "
        "requests (compact; turns are edited again)",
    )
    parser.add_argument("--snapshot-every", type=positive, default=10, metavar="N", help="turns (default 10)")
    parser.add_argument(
        "--keep-snapshots", type=positive, default=3, metavar="N", help="of the newest, besides the first (default 3)"
    )
    _add_warm_up(parser)
    add_guard_options(parser)
    add_json_option(parser)

    parser = _action(actions, "edit", "edit a file of requests, or what is left of it", _EDIT, "begin.edit")
    parser.add_argument("--requests", required=True, metavar="FILE", help=FILES)
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N requests of the file")
    _add_warm_up(parser)
    add_guard_options(parser)
    add_json_option(parser)
    add_opening_options(parser)


def _add_warm_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--warm-up", metavar="FILE", help="training stream that is edited first and stays in the model")
    parser.add_argument("--warm-up-limit", type=positive, metavar="N", help="only its first N requests")
    add_format_options(parser)
    add_warm_up_format_options(parser)


_AUDIT = "  stableedit session audit edits/ --sample 500"
_EVALUATE = "  stableedit session evaluate edits/ --output scores.json"
_REPAIR = "  stableedit session repair edits/ --rounds 2"


def _add_hold(actions) -> None:
    parser = _action(actions, "audit", "look which current edits still hold", _AUDIT, "hold.audit")
    parser.add_argument("--sample", type=positive, metavar="N", help="look at so many current requests (default: all)")
    _add_least(parser)
    add_json_option(parser)
    add_opening_options(parser)

    summary = "score the current edits: efficacy, generalization, specificity, free answers, locality"
    parser = _action(actions, "evaluate", summary, _EVALUATE, "hold.evaluate")
    own = "whether the own answers of the session's unedited model stay"
    add_metrics_option(parser, own, ("accuracy", "generation", "locality"))
    add_form_options(parser, chat="as the session edits", end="not", split="as the session edits")
    parser.add_argument("--output", metavar="FILE", help="save scores and per-request values as JSON")
    add_json_option(parser)
    add_opening_options(parser)

    parser = _action(actions, "repair", "solve again for current edits that were forgotten", _REPAIR, "hold.repair")
    parser.add_argument("--rounds", type=positive, default=1, metavar="N", help="at most (default 1)")
    parser.add_argument("--budget", type=positive, metavar="N", help="at most so many requests (default: no limit)")
    _add_least(parser)
    add_json_option(parser)
    add_guard_options(parser)
    add_opening_options(parser)


def _add_least(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-probability",
        type=float,
        metavar="X",
        help="an edit holds if every answer token is the model's top choice, with at least this probability (default: "
        "the config's take_probability)",
    )


_STATUS = "  stableedit session status edits/"
_LOG = """\
  stableedit session log edits/ --last 20
  stableedit session log edits/ --requests     # every request, and what became of it"""
_VERIFY = """\
  stableedit session verify edits/
  stableedit session verify edits/ --repair    # go on without what cannot be used"""


def _add_look(actions) -> None:
    parser = _action(actions, "status", "where the session stands", _STATUS, "look.show_status")
    add_json_option(parser)
    parser = _action(actions, "log", "what happened, record by record", _LOG, "look.show_log")
    parser.add_argument("--last", type=positive, metavar="N", help="only the last N records or requests")
    parser.add_argument("--requests", action="store_true", help="requests instead of records")
    add_json_option(parser)
    parser = _action(actions, "verify", "check every record and every snapshot", _VERIFY, "look.show_verify")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="consent to going on without what is damaged; the bytes, and the requests in them, are kept aside",
    )
    add_json_option(parser)


_EXPORT = """\
  stableedit session export edits/ --format model --output edited/
  stableedit session export edits/ --format lora --keep 0.95 --output adapter/"""


def _add_ship(actions) -> None:
    summary = "ship the model: whole, its changed tensors, a patch for libstableedit, a LoRA adapter or GGUF"
    parser = _action(actions, "export", summary, _EXPORT, "ship.export_session")
    add_export_options(parser)
    parser.add_argument(
        "--shrink",
        type=float,
        metavar="X",
        help="ship only this share of the whole change, e.g. 0.85",
    )
    add_opening_options(parser)


_ROLLBACK = "  stableedit session rollback edits/ --to-turn 12    # see: stableedit session log edits/"
_REVERT = """\
  stableedit session revert edits/ r-5d41402abc4b    # ids: stableedit session log edits/ --requests
  stableedit session revert edits/ r-5d41402abc4b r-7d793037a076 --others all --json"""


def _add_undo(actions) -> None:
    summary = "go back to how the model was after a turn, bit for bit"
    parser = _action(actions, "rollback", summary, _ROLLBACK, "undo.rollback")
    parser.add_argument("--to-turn", type=int, required=True, metavar="N", help="0 is before the first")
    add_json_option(parser)
    add_opening_options(parser)

    summary = "take requests out of the model and bring the unedited answers back"
    parser = _action(actions, "revert", summary, _REVERT, "undo.revert")
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
    add_json_option(parser)
    add_opening_options(parser)


def _count(text: str) -> int | None:
    """argparse type: a whole number, or all."""
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'all'")
    return int(text)
