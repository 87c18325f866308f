"""``stableedit session status``, ``log`` and ``verify``: nothing of this needs the model, or stops a writer."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from stableedit_cpp.cli.options import positive
from stableedit_cpp.cli.session.common import new_action, print_json
from stableedit_cpp.lifelong import SessionView, verify

_STATUS = "  stableedit session status edits/"
_LOG = """\
  stableedit session log edits/ --last 20
  stableedit session log edits/ --requests     # every request, and what became of it"""
_VERIFY = """\
  stableedit session verify edits/
  stableedit session verify edits/ --repair    # go on without what cannot be used"""


def add_parsers(actions) -> None:
    parser = new_action(actions, "status", "where the session stands", _STATUS, show_status)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser = new_action(actions, "log", "what happened, record by record", _LOG, show_log)
    parser.add_argument("--last", type=positive, metavar="N", help="only the last N records or requests")
    parser.add_argument("--requests", action="store_true", help="requests instead of records")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser = new_action(actions, "verify", "check every record and every snapshot", _VERIFY, show_verify)
    parser.add_argument(
        "--repair",
        action="store_true",
        help="consent to going on without what is damaged; the bytes, and the requests in them, are kept aside",
    )


def show_status(options: argparse.Namespace) -> int:
    status = SessionView(options.directory).status()
    if options.json:
        print_json(status)
    else:
        print(status)
    return 0


def show_log(options: argparse.Namespace) -> int:
    view = SessionView(options.directory)
    if options.requests:
        fields = [
            {"id": entry.id, "turn": entry.turn, "state": entry.state, "repairs": entry.repairs}
            | {"prompt": entry.request.prompt, "target": entry.request.target}
            | {"variants": [list(pair) for pair in entry.request.variants]}
            for entry in view.history.entries.values()
        ]
        lines = [
            "{id:<20} turn {turn:<6} {state:<24} {prompt} -> {target}".format(**entry)
            + (f" (and {len(entry['variants'])} variants)" if entry["variants"] else "")
            for entry in fields
        ]
    else:
        entries = view.log()
        fields, lines = [dataclasses.asdict(entry) for entry in entries], [str(entry) for entry in entries]
    last = slice(-options.last if options.last else None, None)
    if options.json:
        print_json(fields[last])
    else:
        for line in lines[last]:
            print(line)
    if view.damage is not None:
        print(f"stableedit: {view.journal.path}: {view.damage}", file=sys.stderr)
    return 0


def show_verify(options: argparse.Namespace) -> int:
    report = verify(options.directory, repair=options.repair)
    print(report)
    return 0 if report.sound else 1
